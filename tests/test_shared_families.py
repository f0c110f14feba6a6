"""The card of a shift that was made on another family of models: its loader does there what this program does."""

import pytest
import torch
from conftest import CPU, make_xl
from diffusers import DiffusionPipeline
from families import MAKERS, make_family

from ldm import erase, export
from ldm.diffusion.load import load_model
from ldm.erasure.merge import applied, edited
from ldm.erasure.shift import WeightShift

FEW = {"retain_captions": 20, "retain_words": 10, "compositions": 5, "misspellings": 0}
PROMPTS = ["VanGogh", "a dog"]


def make_card(name, folder, **settings):
    """Return a tiny model with the pipeline of its card's code, that code, and a shift's file."""
    path = make_xl(folder / name) if name == "xl" else make_family(name, folder / name)
    model = load_model(path, CPU)
    made = erase(model, "VanGogh", artifacts_dir=folder / "made", ridge_weight=1e-6, **FEW, **settings)
    export(model, made, folder / "out", "shift", rank=4)
    file = folder / "out-shift" / "VanGogh.safetensors"
    lacking = {"text_encoder_3": None, "tokenizer_3": None} if name == "sd3-without-t5" else {}
    pipe = DiffusionPipeline.from_pretrained(path, **lacking)
    pipe.set_progress_bar_config(disable=True)
    return model, pipe, file


def loader(file) -> tuple[str, dict]:
    card = file.with_suffix(".md").read_text()
    module: dict = {}
    exec(card.split("```python\n")[2].split("```")[0], module)  # of our own card, as its reader would run it
    return card, module


@pytest.mark.parametrize("name", [*MAKERS, "xl"])
def test_the_change_of_weights_is_that_of_every_family(name, tmp_path):
    model, pipe, file = make_card(name, tmp_path, gate=False)
    card, module = loader(file)
    assert (
        f"In a {type(pipe).__name__} it erases by its change of weights.\n" in card
        and "gated=" not in card.split("```python")[1]
    )
    given = [torch.randn(2, *model.latent_shape), torch.tensor(500.0), model.encode_prompt(PROMPTS)]

    def drawn(denoiser):
        return model.adapter.predict(denoiser, *given[:2], model.split(given[2]), model.image_size)

    denoiser = getattr(pipe, model.adapter.denoiser)
    before = drawn(denoiser)
    restore = module["erase"](pipe, str(file))
    with applied(model.denoiser, [WeightShift.load(file)]):
        expected = drawn(model.denoiser)
    after = drawn(denoiser)
    change = (expected - before).abs().max()
    assert change > 1e-6 and (after - expected).abs().max() < 0.01 * change + 1e-6
    restore()
    assert torch.equal(drawn(denoiser), before)


def test_its_gates_act_in_flux(tmp_path):
    model, pipe, file = make_card("flux", tmp_path, gate=True)
    shift = WeightShift.load(file)
    assert set(shift.gated.gates) <= {"text_encoder", "text_encoder_2"} and set(shift.gated.maps) == {
        "tokens",
        "pooled",
    }
    card, module = loader(file)
    assert "In a FluxPipeline it erases by its gate.\n" in card
    assert 'pipe("VanGogh", height=16, width=16, max_sequence_length=24).images' in card
    before = pipe.encode_prompt(PROMPTS, num_images_per_prompt=2, max_sequence_length=24)
    restore = module["erase"](pipe, str(file))
    after = pipe.encode_prompt(PROMPTS, num_images_per_prompt=2, max_sequence_length=24)
    with edited(model, {"": shift}, "gated"):
        expected = model.split(model.encode_prompt(PROMPTS))
    assert torch.allclose(after[0][::2], expected.tokens, atol=1e-5)
    assert torch.allclose(after[1][::2], expected.pooled, atol=1e-5)
    for stream in (0, 1):
        assert torch.equal(after[stream][2:], before[stream][2:]) and torch.equal(after[stream][0], after[stream][1])
        assert not torch.allclose(after[stream][0], before[stream][0], atol=1e-3)
    restore()
    assert all(map(torch.equal, pipe.encode_prompt(PROMPTS, num_images_per_prompt=2, max_sequence_length=24), before))


def test_the_card_of_a_gate_that_no_loader_reads_has_none(tmp_path):
    _, _, file = make_card("pixart-alpha", tmp_path, gate=True, mode="gate")
    card = file.with_suffix(".md").read_text()
    assert "## With this program" in card and "## Without it" not in card and "card_loader" not in card
