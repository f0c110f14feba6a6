"""Shifts of one checkpoint on another with the same text encoder, and of a text encoder alone."""

import json
import shutil

import pytest
import torch
from conftest import CPU, ROOT, is_error
from safetensors.torch import load_file, save_file

from ldm.diffusion.load import load_model
from ldm.erasure.portable import is_foreign, take_shifts
from ldm.erasure.shift import WeightShift
from ldm.io.errors import Notice
from ldm.io.images import image_to_tensor, open_image
from ldm.io.paths import ArtifactPaths

ERASE, GENERATE = "train-scripts/SRS_ME.py", "eval-scripts/generate-images-merge.py"
# VanGogh, with Picasso protected, as fast as can be; the models are random, and so no effect is asked for.
VAN_GOGH = ["--erased_index", "1", "--em_indexes", "1,2", "--device", "cpu", "--least_effect", "-9"]
GATE = ["--gate", "--retain_captions", "40", "--retain_words", "20"]
PROMPTS = ["VanGogh", "Picasso", "", "CCS 2024"]
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="session")
def second_path(mini_path, tmp_path_factory):
    """Return a model that differs from `mini_path` in its U-Net's weights alone."""
    folder = shutil.copytree(mini_path, tmp_path_factory.mktemp("models") / "second")
    weights = load_file(folder / "unet" / WEIGHTS)
    generator = torch.Generator().manual_seed(0)
    changed = {
        name: value + value.float().std(correction=0).half() * torch.randn(value.shape, generator=generator).half()
        for name, value in weights.items()
    }
    save_file(changed, folder / "unet" / WEIGHTS, metadata={"format": "pt"})
    return folder


@pytest.fixture
def erase(script, tmp_path):
    """Return a function that makes the shift of VanGogh on a model or a text encoder, and returns its file."""

    def run(flag, folder, *flags):
        artifacts_dir = tmp_path / "shifts"
        code, out, err = script(ERASE, flag, folder, "--artifacts_dir", artifacts_dir, *VAN_GOGH, *flags)
        assert code == 0, err
        assert "| VanGogh |" in out
        return ArtifactPaths(artifacts_dir, "SRS-ME", folder.name, "style", 1, 0).shift("1")

    return run


@pytest.fixture
def images_of(script, tmp_path):
    """Return a function that generates an image of each of PROMPTS: the images (N, 3, h, w) in [-1, 1], and stderr."""
    path = tmp_path / "list.csv"
    rows = [f"{prompt},{number},{number}" for number, prompt in enumerate(PROMPTS)]
    path.write_text("\n".join(["prompt,evaluation_seed,case_number", *rows]) + "\n")

    def run(model, *flags):
        common = ["--prompts_path", path, "--num_inference_steps", "3", "--guidance_scale", "7.5", "--device", "cpu"]
        folder = tmp_path / "images" / f"{model.name}{len(flags)}"
        code, _, err = script(GENERATE, "--model", model, "--save_path", folder, *common, *flags)
        assert code == 0, err
        files = [next(folder.glob(f"*-merge/{number}_0.png")) for number in range(len(PROMPTS))]
        return torch.stack([image_to_tensor(open_image(file)) for file in files]), err

    return run


def check_images(before, after):
    """Assert that a random model's image of VanGogh changes, and no pixel of the protected prompts' by more than 1."""
    difference = (after - before).abs().amax((1, 2, 3)) * 127.5  # of 255
    assert difference[0] > 3 and difference[1:].max() < 1.5


@pytest.mark.parametrize(("form", "flags"), [("linear", ["--no-gate"]), ("gated", GATE)])
def test_a_shift_acts_on_another_checkpoint_and_says_for_which_it_was_made(
    mini_path, second_path, erase, images_of, tmp_path, form, flags
):
    path = erase("--model", mini_path, *flags)
    before, said = images_of(second_path)
    assert "shares" not in said
    after, said = images_of(second_path, "--shifts", path, "--form", form)
    notice = "VanGogh: made for mini-sd's text encoder, which this model (second) shares"
    assert said.count(notice) == 1
    check_images(before, after)
    metadata = json.loads(next(tmp_path.rglob("1-merge/metadata.json")).read_text())
    assert metadata["shifts"]["1"]["measured_on"] == "second"
    assert notice not in images_of(mini_path, "--shifts", path, "--form", form)[1]


def test_a_shift_is_the_same_whichever_of_two_checkpoints_it_is_made_on_and_measured_on_the_one_that_takes_it(
    mini_path, second_path, erase
):
    made, own = (WeightShift.load(erase("--model", path, "--no-gate")) for path in (mini_path, second_path))
    model = load_model(second_path, CPU)
    assert model.text_digest == load_model(mini_path, CPU).text_digest
    assert torch.equal(made.outputs, own.outputs) and torch.equal(made.directions, own.directions)
    assert is_foreign(made, model) and not is_foreign(own, model)
    with pytest.warns(Notice, match="what the shifts do is measured on this model"):
        taken = take_shifts(model, {"1": made})["1"]
    assert taken.metadata["effects"] != made.metadata["effects"]
    for form, effect in own.metadata["effects"].items():
        for name, value in effect.items():
            expected = pytest.approx(value, rel=1e-3) if isinstance(value, float) else value
            assert taken.metadata["effects"][form][name] == expected
    for name in ("target_change", "max_leakage_protected"):
        assert taken.metadata[name] == pytest.approx(own.metadata[name], rel=1e-3)


def test_a_model_with_another_text_encoder_refuses_it(mini_path, other_path, erase, script, tmp_path):
    path = erase("--model", mini_path, "--no-gate")
    words = "made for another text encoder", "that of mini-sd", "pass --model one that has it"
    flags = ["--model", other_path, "--shifts", path, "--save_path", tmp_path / "out", "--device", "cpu"]
    is_error(script(GENERATE, *flags, "--prompts_path", ROOT / "data" / "watermark.csv"), *words)


def test_a_shift_of_a_text_encoder_alone_is_taken_by_every_model_that_has_it(
    mini_path, second_path, erase, images_of, tmp_path
):
    alone = tmp_path / "encoder"  # of which nothing else can be read
    for part in ("text_encoder", "tokenizer"):
        shutil.copytree(mini_path / part, alone / part)
    shutil.copy(mini_path / "srs-me.yaml", alone)
    path = erase("--text_encoder", alone, "--no-gate")
    made, whole = WeightShift.load(path), WeightShift.load(erase("--model", mini_path, "--no-gate"))
    assert torch.equal(made.outputs, whole.outputs) and torch.equal(made.directions, whole.directions)
    assert "base_digest" not in made.metadata and "target_change" not in made.metadata
    for model in (mini_path, second_path):
        before, _ = images_of(model)
        after, said = images_of(model, "--shifts", path)
        assert f"VanGogh: made for encoder's text encoder, which this model ({model.name}) shares" in said
        check_images(before, after)
