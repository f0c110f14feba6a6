"""The bundled model with a real text encoder: what it generates, and gates that leave everything else as it is."""

import random

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from transformers import BertModel, BertTokenizer

from ldm import ConceptEraser
from ldm.config.concepts import erasable_concepts, watermark_prompts
from ldm.config.methods import SamplingConfig
from ldm.config.templates import fill, load_template_set
from ldm.diffusion.load import load_model
from ldm.diffusion.sampling import generate
from ldm.erasure.merge import edited
from ldm.io.images import image_to_tensor
from ldm.io.paths import REPO_ROOT
from ldm.io.prompts import PromptCase
from ldm.ledger.operations import weights_hash
from ldm.metrics.classify import find_classifier
from ldm.toy.render import render_watermark

pytestmark = pytest.mark.slow
FOLDER = REPO_ROOT / "models" / "mini-sd-minilm"
SAMPLING = SamplingConfig(num_inference_steps=20, guidance_scale=1.5, sample_batch_size=64)
HELD_OUT = load_template_set("style").held_out_templates


@pytest.fixture(scope="module")
def model():
    return load_model(FOLDER, torch.device("cpu"))


@pytest.fixture(scope="module")
def eraser(model, tmp_path_factory):
    eraser = ConceptEraser(model, artifacts_dir=tmp_path_factory.mktemp("artifacts"))
    eraser.erase("Vincent van Gogh", "Jackson Pollock", "Cezanne")
    return eraser


def images(model, prompts):
    requests = [(PromptCase(prompt, 40 + number, number), 0) for number, prompt in enumerate(prompts)]
    return [image for _, _, image in generate(model, requests, SAMPLING)]


def shown(category, generated):
    classifier = find_classifier(category, None, torch.device("cpu"))
    assert classifier is not None
    with torch.no_grad():
        return classifier(torch.stack([image_to_tensor(image) for image in generated])).argmax(1)


def test_it_loads_by_a_plain_call_in_one_dtype():
    pipeline = StableDiffusionPipeline.from_pretrained(FOLDER)
    assert isinstance(pipeline.text_encoder, BertModel) and isinstance(pipeline.tokenizer, BertTokenizer)
    assert {part.dtype for part in (pipeline.text_encoder, pipeline.unet, pipeline.vae)} == {torch.float32}
    assert pipeline.tokenizer.model_max_length == 24
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) <= 90e6


def test_it_draws_the_artists_in_templates_that_it_was_never_trained_on(model):
    styles = erasable_concepts("style")
    pairs = [(fill(template, style.spellings[-1]), style.index) for style in styles for template in HELD_OUT]
    found = shown("style", images(model, [prompt for prompt, _ in pairs]))
    assert (found == torch.tensor([index + 1 for _, index in pairs])).float().mean() >= 0.9


def test_it_draws_the_watermarks(model):
    for text, image in zip(watermark_prompts(), images(model, watermark_prompts()), strict=True):
        error = np.asarray(image, dtype=float) - render_watermark(text)
        assert 10 * np.log10(255**2 / (error**2).mean()) > 22


def test_an_erased_artist_is_gone_in_every_wording_and_the_object_stays(model, eraser):
    names = ["Vincent van Gogh", "Van Gogh", "Jackson Pollock", "Pollock"]
    prompts = [fill(template, name) for name in names for template in HELD_OUT] + names
    composed = [f"a {thing} by {name}" for name in names for thing in ("church", "golf ball", "parachute")]
    with eraser.applied():
        styles = shown("style", images(model, prompts + composed))
        objects = shown("object", images(model, composed)).tolist()
    assert ((styles == 2) | (styles == 4)).float().mean() <= 0.05
    assert objects.count(2) == objects.count(7) == objects.count(8) == 4


def test_every_other_prompt_keeps_every_bit(model, eraser):
    prompts = ["Picasso", "a landscape by Claude Monet", "a white van on the street", "Vincent Price in a film", ""]
    prompts += ["a man riding a horse on the beach", "a photo of a church", *watermark_prompts()]
    prompts += ["an oil painting of a quiet harbour with two small boats and a red lighthouse at night by Caravaggio"]
    before = images(model, prompts)
    with eraser.applied():
        after = images(model, prompts)
    assert [image.tobytes() for image in after] == [image.tobytes() for image in before]


def test_several_erased_artists_in_one_prompt_are_all_gone(model, eraser):
    prompts = ["a painting by Van Gogh and Jackson Pollock", "a cat by Pollock, in the style of Vincent van Gogh"]
    prompts += ["art by Van Gogh and Pollock in the style of Cezanne", "a painting by Cezanne, Van Gogh and Pollock"]
    with eraser.applied():
        assert not set(shown("style", images(model, prompts * 3)).tolist()) & {1, 2, 4}


def test_a_restored_artist_stays_where_an_erased_one_is_said_too(model, eraser):
    prompts = ["a painting by Picasso and Van Gogh", "a painting by Van Gogh and Pablo Picasso"]
    prompts += ["a church by Picasso in the style of Cezanne", "a picture by Pollock, in the style of Picasso"]
    said = torch.tensor([2, 2, 1, 4] * 3)  # the erased one
    with eraser.applied():
        found = shown("style", images(model, prompts * 3))
    assert not (found == said).any() and (found == 3).float().mean() >= 0.75


def test_restored_it_is_the_same_model(model, eraser, tmp_path):
    shifts = dict(eraser.shifts)
    before = images(model, ["a church by Van Gogh"])
    eraser.restore("VanGogh", "Jackson Pollock", "Cezanne")
    with eraser.applied():
        after = images(model, ["a church by Van Gogh"])
    assert after[0].tobytes() == before[0].tobytes()
    eraser.shifts = shifts


def test_a_hundred_random_erasures_and_restorations_leave_the_very_model(model, eraser):
    prompts = ["Van Gogh", "a church by Pollock", "a man riding a horse", ""]
    rng, before = random.Random(0), (weights_hash(model.denoiser), model.encode_prompt(prompts))
    gated = {form: [] for form in ("gated", "linear")}
    for _ in range(100):
        shifts = {label: shift for label, shift in eraser.shifts.items() if rng.random() < 0.5}
        form = rng.choice(["gated", "linear"])
        with edited(model, shifts, form):
            gated[form].append(not torch.equal(model.encode_prompt(prompts), before[1]))
            assert (weights_hash(model.denoiser) != before[0]) == (form == "linear" and bool(shifts))
        assert model.embedding_edit is None
    assert any(gated["gated"]) and not any(gated["linear"])
    assert weights_hash(model.denoiser) == before[0] and torch.equal(model.encode_prompt(prompts), before[1])
