"""The bundled model of the FLUX architecture: what it draws, and shifts of its text encoder that erase in it."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline
from PIL import Image

import ldm
from ldm.config.concepts import erasable_concepts, get_concept, watermark_prompts
from ldm.config.methods import GateConfig, SamplingConfig, SRSMEConfig
from ldm.config.models import bundled_config
from ldm.config.templates import fill, load_template_set
from ldm.diffusion.load import load_model
from ldm.diffusion.load_text import load_text_model
from ldm.diffusion.sampling import generate
from ldm.erasure.effect import judge
from ldm.erasure.erase import erase
from ldm.erasure.merge import edited, load_shifts
from ldm.erasure.portable import take_shifts
from ldm.erasure.protection import Protection
from ldm.erasure.shift import WeightShift
from ldm.io.errors import Notice
from ldm.io.images import image_to_tensor
from ldm.io.paths import REPO_ROOT, ArtifactPaths
from ldm.io.prompts import PromptCase
from ldm.ledger.operations import weights_hash
from ldm.metrics.classify import find_classifier
from ldm.toy.render import render_watermark

pytestmark = pytest.mark.slow
FOLDER, CPU = REPO_ROOT / "models" / "mini-flux", torch.device("cpu")
SAMPLING = SamplingConfig(num_inference_steps=20, guidance_scale=1.5, sample_batch_size=64)
HELD_OUT = load_template_set("style").held_out_templates
ERASED = (0, 1, 3)


@pytest.fixture(scope="module")
def model():
    return load_model(FOLDER, CPU)


@pytest.fixture(scope="module")
def shifts(tmp_path_factory):
    """Return shifts of three artists, made on the text encoder that mini-flux shares with mini-sd-minilm."""
    return made_on_text(tmp_path_factory.mktemp("artifacts"), with_pooled=False)


@pytest.fixture(scope="module")
def with_pooled(tmp_path_factory):
    """Return the same with its pooled embedding, which mini-flux takes too."""
    return made_on_text(tmp_path_factory.mktemp("artifacts"), with_pooled=True)


def made_on_text(folder, with_pooled):
    text = load_text_model(REPO_ROOT / "models" / "mini-sd-minilm", CPU, with_pooled)
    artifacts = ArtifactPaths(folder, "SRS-ME", text.name, "style", scene=1, time=0)
    erase_three(text, artifacts, bundled_config("mini-sd-minilm"))
    return load_shifts(artifacts, ",".join(map(str, ERASED)))[0]


def erase_three(model, artifacts, config):
    settings = config.methods["SRS-ME"]
    assert isinstance(settings, SRSMEConfig)
    protection = Protection([get_concept("style", index) for index in range(9)], config.null_space)
    concepts = [get_concept("style", index) for index in ERASED]
    erase(model, artifacts, concepts, settings, protection, artifacts.root, GateConfig(gate=True))


def images(model, prompts):
    requests = [(PromptCase(prompt, 40 + number, number), 0) for number, prompt in enumerate(prompts)]
    return [image for _, _, image in generate(model, requests, SAMPLING)]


def shown(category, generated):
    classifier = find_classifier(category, None, CPU)
    assert classifier is not None
    with torch.no_grad():
        return classifier(torch.stack([image_to_tensor(image) for image in generated])).argmax(1)


def test_it_loads_by_a_plain_call_and_draws_what_this_package_draws(model):
    pipe = FluxPipeline.from_pretrained(FOLDER)
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(40)
    options = {"height": 64, "width": 64, "num_inference_steps": 20, "max_sequence_length": 24}
    [image] = pipe("a church", generator=generator, **options).images
    assert np.array_equal(image, images(model, ["a church"])[0])
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) <= 120e6


def test_it_draws_every_concept_and_the_watermarks(model):
    for category in ("style", "object"):
        prompts = [concept.prompt for concept in erasable_concepts(category)] * 4
        wanted = torch.arange(len(prompts)) % 9 + 1
        assert (shown(category, images(model, prompts)) == wanted).float().mean() >= 0.94
    for text, image in zip(watermark_prompts(), images(model, watermark_prompts()), strict=True):
        error = np.asarray(image, dtype=float) - render_watermark(text)
        assert 10 * np.log10(255**2 / (error**2).mean()) > 22


@pytest.fixture(scope="module")
def own(model, tmp_path_factory):
    """Return shifts of three artists of mini-flux itself, of both of its streams."""
    config = bundled_config("mini-flux")
    artifacts = ArtifactPaths(tmp_path_factory.mktemp("artifacts"), "SRS-ME", model.name, "style", scene=1, time=0)
    erase_three(model, artifacts, config)
    return load_shifts(artifacts, ",".join(map(str, ERASED)))[0]


NAMES = ["Vincent van Gogh", "Van Gogh", "Jackson Pollock", "Pollock", "Cezanne"]
SAYING = [fill(template, name) for name in NAMES for template in HELD_OUT] + NAMES
SAYING += [f"a {thing} by {name}" for name in NAMES for thing in ("church", "golf ball", "parachute")]


def left(model):
    """Return the fraction of images of prompts that say an erased artist which still show this one."""
    said = torch.tensor([2 if "Gogh" in prompt else 4 if "Pollock" in prompt else 1 for prompt in SAYING])
    return (shown("style", images(model, SAYING)) == said).float().mean()


def test_gates_erase_three_artists_and_every_other_image_keeps_every_bit(model, own):
    others = ["Picasso", "a church by Picasso", "a man riding a horse on the beach", "", *watermark_prompts()]
    before = images(model, others)
    with edited(model, own, "gated"):
        assert left(model) <= 0.05
        after = images(model, others)
    assert [image.tobytes() for image in after] == [image.tobytes() for image in before]


def test_the_card_of_a_shift_erases_without_this_program(model, tmp_path):
    few = {"retain_captions": 50, "retain_words": 20, "misspellings": 0, "gate": True}
    made = ldm.erase(model, "Van Gogh", artifacts_dir=tmp_path / "made", **few)
    ldm.export(model, made, tmp_path / "out", "shift")
    [file] = (tmp_path / "out-shift").glob("*.safetensors")
    _, use, loader = file.with_suffix(".md").read_text().split("```python\n")
    (file.parent / "card_loader.py").write_text(loader.split("```")[0])
    code = use.split("```")[0].replace('"MODEL"', repr(str(FOLDER)))
    assert "max_sequence_length=24)" in code
    seeded = "max_sequence_length=24, num_inference_steps=20, generator=torch.Generator().manual_seed(40))"
    (file.parent / "use.py").write_text(f"import torch\n{code.replace('max_sequence_length=24)', seeded)}")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run([sys.executable, "use.py"], cwd=file.parent, env=environment, check=True)
    with edited(model, take_shifts(model, {"": WeightShift.load(file)}), "gated"):
        [expected] = images(model, ["Van Gogh"])
    shown, original = image_to_tensor(Image.open(file.parent / "without.png")), images(model, ["Van Gogh"])[0]
    assert (shown - image_to_tensor(expected)).abs().max() < 2.5 / 255
    assert (shown - image_to_tensor(original)).abs().max() > 0.2


def test_the_linear_form_leaves_what_is_protected_and_restored_it_is_the_very_model(model, own):
    protected = ["Picasso", "Kilian Eng", "", *watermark_prompts()]
    before, weights = images(model, protected), weights_hash(model.denoiser)
    with edited(model, own, "linear"):
        after = images(model, protected)
        assert left(model) <= 0.1
    for image, other in zip(before, after, strict=True):
        assert np.abs(np.asarray(image, dtype=int) - np.asarray(other, dtype=int)).max() <= 1
    restored = {label: shift for label, shift in own.items() if label != "1"}
    with edited(model, restored, "linear"):
        [again] = images(model, ["VanGogh"])
    [original] = images(model, ["VanGogh"])
    assert np.abs(np.asarray(again, dtype=int) - np.asarray(original, dtype=int)).max() <= 1
    assert weights_hash(model.denoiser) == weights


def test_a_file_of_the_shared_text_encoder_acts_on_the_tokens_and_is_not_said_to_erase(model, shifts):
    with pytest.warns(Notice, match="what the others give stays as it is: pooled"):
        taken = take_shifts(model, shifts)
    prompts = ["Van Gogh", "Picasso", ""]
    before = model.split(model.encode_prompt(prompts))
    with edited(model, taken, "gated"):
        after = model.split(model.encode_prompt(prompts))
        assert left(model) <= 0.15
    assert not torch.equal(after.tokens[0], before.tokens[0]) and torch.equal(after.tokens[1:], before.tokens[1:])
    assert torch.equal(after.pooled, before.pooled)
    assert [judge(shift.metadata, "gated") for shift in taken.values()] == [(None, {})] * 3
    with edited(model, taken, "linear"):
        assert weights_hash(model.denoiser) != weights_hash(load_model(FOLDER, CPU).denoiser)


def test_one_file_made_on_the_text_encoder_alone_erases_in_a_unet_and_in_flux(model, with_pooled):
    unet = load_model(REPO_ROOT / "models" / "mini-sd-minilm", CPU)
    for each in (model, unet):
        with pytest.warns(Notice, match="what the shifts do is measured on this model"):
            taken = take_shifts(each, with_pooled)
        assert not any("unchanged" in shift.metadata for shift in taken.values())
        assert all(judge(shift.metadata, "gated")[0] for shift in taken.values())
        before = each.encode_prompt(["Picasso", ""])
        with edited(each, taken, "gated"):
            assert left(each) <= 0.05 and torch.equal(each.encode_prompt(["Picasso", ""]), before)
        with edited(each, taken, "linear"):
            assert left(each) <= 0.15
    assert set(next(iter(with_pooled.values())).gated.maps) == {"tokens", "pooled"}
