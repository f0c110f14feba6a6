"""Facts about the model that is committed: what it is, that it draws its world, and that one style goes and comes back."""

import itertools

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from transformers import CLIPTextModel, CLIPTokenizer

from ldm.attention import kv_layers
from ldm.concepts import ROOT, erasable, get_concept, watermarks
from ldm.images import Case, load_batch, save_image
from ldm.latents import noisy
from ldm.losses import SeparableErasure
from ldm.metrics.classify import load_classifier, predict
from ldm.model import load, settings
from ldm.sampling import generate
from ldm.shift import NullSpaceBasis, WeightShift, applied
from ldm.training import MomentumStop, erase

from conftest import CPU

MODEL = ROOT / "models" / "mini-sd"


@pytest.fixture(scope="module")
def model():
    return load(MODEL, CPU)


def test_it_is_a_small_stable_diffusion_that_plain_diffusers_loads():
    pipe = StableDiffusionPipeline.from_pretrained(MODEL, safety_checker=None)
    assert isinstance(pipe.unet, UNet2DConditionModel) and isinstance(pipe.vae, AutoencoderKL)
    assert isinstance(pipe.text_encoder, CLIPTextModel) and isinstance(pipe.tokenizer, CLIPTokenizer)
    resolutions = {name.split(".attentions")[0] for name in kv_layers(pipe.unet)}
    assert {"down_blocks.1", "down_blocks.2", "mid_block"} <= resolutions
    assert sum(path.stat().st_size for path in MODEL.rglob("*") if path.is_file()) <= 40e6


def draw(model, prompts, tmp_path, name, seeds=3):
    sampling = settings(model.base).sampling
    cases = [Case(prompt, 100 + n, k * seeds + n) for k, prompt in enumerate(prompts) for n in range(seeds)]
    images = {}
    for case, _, image in generate(model, cases, 1, sampling.ddim_steps, sampling.guidance_scale, sampling.batch_size):
        path = tmp_path / name / f"{case.number}_0.png"
        save_image(path, image)
        images.setdefault(case.prompt, []).append(path)
    return images


def pixels(paths):
    return np.stack([np.asarray(Image.open(path), dtype=int) for path in paths])


@pytest.mark.parametrize("category", ["style", "object"])
def test_it_draws_its_concepts(model, category, tmp_path):
    classifier, _ = load_classifier(ROOT / "models" / "classifiers" / f"{category}.safetensors", CPU)
    images = draw(model, [concept.prompt for concept in erasable(category)], tmp_path, "drawn")
    right = [(predict(classifier, paths) == k + 1).float().mean().item() for k, paths in enumerate(images.values())]
    assert sum(right) / len(right) >= 0.85


def test_a_style_goes_alone_and_comes_back_bit_for_bit(model, tmp_path):
    given, concept = settings("mini-sd"), get_concept("style", 1)
    protected = ["", *watermarks(), "Picasso"]
    prompts = [concept.prompt, *protected]
    base = {name: weight.clone() for name, weight in model.unet.state_dict().items()}
    before = draw(model, prompts, tmp_path, "before")
    basis = NullSpaceBasis.solve(model.encode_prompt(protected), protected, given.solution.tolerance, "svd", {})
    layers, embedding = kv_layers(model.unet), model.encode_prompt([concept.prompt])
    shift = WeightShift.zeros(layers, basis.directions(embedding, given.erasure.max_base), given.erasure.scale_factor)
    loss = SeparableErasure(model, layers, shift, embedding, model.encode_prompt([""]), given.erasure.reg_beta)
    stop = MomentumStop(given.erasure.threshold)
    batches = noisy(model, model.encode_image(load_batch(before[concept.prompt])), given.erasure.batch_size, 0)
    for step in itertools.islice(erase(loss, shift.parameters(), batches, given.erasure.lr), given.erasure.iter_break):
        if stop.update(step):
            break
    with applied(layers, [shift]):
        after = draw(model, prompts, tmp_path, "after")
    classifier, _ = load_classifier(ROOT / "models" / "classifiers" / "style.safetensors", CPU)
    assert (predict(classifier, before[concept.prompt]) == 2).all()
    assert not (predict(classifier, after[concept.prompt]) == 2).any()
    for prompt in protected:
        assert abs(pixels(before[prompt]) - pixels(after[prompt])).max() <= 2, prompt
    assert all(torch.equal(weight, base[name]) for name, weight in model.unet.state_dict().items())
