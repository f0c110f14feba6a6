"""Facts about the model that is committed: what it is, that it draws its world, and that styles go and come back."""

import itertools

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from transformers import CLIPTextModel, CLIPTokenizer

from ldm.diffusion.text_layers import text_layers
from ldm.config.concepts import erasable_concepts, get_concept, watermark_prompts
from ldm.io.paths import REPO_ROOT
from ldm.io.images import save_image
from ldm.io.prompts import PromptCase
from ldm.diffusion.latents import noised_batches
from ldm.erasure.losses import SRSMELoss
from ldm.metrics.classify import classifier_path, load_classifier, predict
from ldm.metrics.lpips import pairwise_metrics
from ldm.mini.paint import paint_concept
from ldm.toy.render import render_watermark
from ldm.toy.train import reconstruction_psnr
from ldm.config.models import load_model_config
from ldm.diffusion.load import load_model
from ldm.diffusion.sampling import generate, initial_noise, sample_latents
from ldm.erasure.null_space import NullSpaceBasis
from ldm.erasure.merge import applied
from ldm.erasure.shift import SeparableShift
from ldm.erasure.training import MomentumStopping, training_loop

from conftest import CPU

MODEL = REPO_ROOT / "models" / "mini-sd"


@pytest.fixture(scope="module")
def model():
    return load_model(MODEL, CPU)


def test_it_is_a_small_stable_diffusion_that_plain_diffusers_loads():
    pipe = StableDiffusionPipeline.from_pretrained(MODEL, safety_checker=None)
    assert isinstance(pipe.unet, UNet2DConditionModel) and isinstance(pipe.vae, AutoencoderKL)
    assert isinstance(pipe.text_encoder, CLIPTextModel) and isinstance(pipe.tokenizer, CLIPTokenizer)
    resolutions = {name.split(".attentions")[0] for name in text_layers(pipe.unet)}
    assert {"down_blocks.1", "down_blocks.2", "mid_block"} <= resolutions
    assert sum(path.stat().st_size for path in MODEL.rglob("*") if path.is_file()) <= 40e6


def draw(model, prompts, tmp_path, name, seeds=3):
    sampling = load_model_config(model.base).sampling
    cases = [PromptCase(prompt, 100 + n, k * seeds + n) for k, prompt in enumerate(prompts) for n in range(seeds)]
    images = {}
    wanted = [(case, 0) for case in cases]
    for case, _, image in generate(model, wanted, sampling.ddim_steps, sampling.guidance_scale, sampling.batch_size):
        path = tmp_path / name / f"{case.number}_0.png"
        save_image(path, image)
        images.setdefault(case.prompt, []).append(path)
    return images


def pixels(paths):
    return np.stack([np.asarray(Image.open(path), dtype=int) for path in paths])


@pytest.mark.parametrize("category", ["style", "object"])
def test_it_draws_its_concepts(model, category, tmp_path):
    classifier, _ = load_classifier(classifier_path(category), CPU)
    images = draw(model, [concept.prompt for concept in erasable_concepts(category)], tmp_path, "drawn", seeds=6)
    right = [(predict(classifier, paths) == k + 1).float().mean().item() for k, paths in enumerate(images.values())]
    assert sum(right) / len(right) >= 0.9 and min(right) >= 0.6  # of 6 each; the bars are measured on 50


def test_it_draws_its_watermarks_and_keeps_pictures(model, tmp_path):
    for text, paths in draw(model, watermark_prompts(), tmp_path, "marks", seeds=2).items():
        save_image(tmp_path / "mark.png", Image.fromarray(render_watermark(text)))
        assert pairwise_metrics([tmp_path / "mark.png"] * 2, paths, CPU)["psnr"].min() >= 20
    pictures = np.stack([paint_concept(None, np.random.default_rng(k)) for k in range(20)])
    assert reconstruction_psnr(model.vae, pictures).mean() >= 25.5


def erased(model, index, protected, change) -> SeparableShift:
    """The shift that erases a style by the embedded model's own settings, from pictures that it draws."""
    given, concept = load_model_config("mini-sd"), get_concept("style", index)
    erasure = given.erasure["SRS-ME"] | change
    prompts = ["", *watermark_prompts(), *(get_concept("style", other).prompt for other in protected if other != index)]
    basis = NullSpaceBasis.solve(model.encode_prompt(prompts), prompts, given.solution.tolerance, "svd", {})
    loss, embedding = SRSMELoss.of(model, concept, erasure, basis), model.encode_prompt([concept.prompt])
    stop = MomentumStopping(erasure.threshold)
    noise = torch.cat([initial_noise(model, seed, 1) for seed in range(16)])
    clean = sample_latents(model, noise, embedding.expand(16, -1, -1), model.encode_prompt([""]), given.sampling.ddim_steps,
                    given.sampling.guidance_scale)
    batches = noised_batches(model, clean, erasure.batch_size, 0)
    for step in itertools.islice(training_loop(loss, loss.parameters(), batches, erasure.lr), erasure.iter_break):
        if stop.update(step):
            break
    return loss.shift()


@pytest.mark.parametrize("change", [{}, {"init": "zero", "iter_break": 300}], ids=["closed form", "gradient"])
def test_three_styles_go_one_comes_back_and_the_weights_are_the_same_again(model, tmp_path, change):
    names = ["Cezanne", "VanGogh", "Picasso"]
    held_out = "a landscape by VanGogh"
    prompts = [*names, held_out, *watermark_prompts(), "", "Jackson Pollock"]
    base = {name: weight.clone() for name, weight in model.unet.state_dict().items()}
    shifts = [erased(model, index, (0, 1, 2), change) for index in range(3)]
    before = draw(model, prompts, tmp_path, "before")
    with applied(model.unet, shifts):
        after = draw(model, prompts, tmp_path, "after")
    with applied(model.unet, [shifts[0], shifts[2]]):
        restored = draw(model, prompts, tmp_path, "restored")
    assert all(torch.equal(weight, base[name]) for name, weight in model.unet.state_dict().items())

    classifier, _ = load_classifier(classifier_path("style"), CPU)
    for label, name in enumerate(names, start=1):
        assert (predict(classifier, before[name]) == label).float().mean() > 0.6
        assert not (predict(classifier, after[name]) == label).any(), name
    assert not (predict(classifier, after[held_out]) == 2).any()
    assert (predict(classifier, after["Jackson Pollock"]) == 4).all()

    def moved(first, second) -> int:
        return abs(pixels(first) - pixels(second)).max()

    assert moved(before["VanGogh"], restored["VanGogh"]) <= 2
    assert pairwise_metrics(before["VanGogh"], restored["VanGogh"], CPU)["lpips"].max() <= 0.001
    assert all(moved(after[name], restored[name]) <= 2 for name in ("Cezanne", "Picasso"))
    assert all(moved(before[text], images[text]) <= 2 for text in ("", *watermark_prompts()) for images in (after, restored))
