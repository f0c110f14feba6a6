"""The estimate of memory is what an iteration takes."""

import itertools

import pytest
import torch
from bench.bench import peak
from conftest import CPU, make_xl
from families import MAKERS, make_family

from ldm.diffusion.hollow import hollow_pipeline
from ldm.diffusion.latents import noised_batches
from ldm.diffusion.load import load_model
from ldm.diffusion.text_layers import text_layers
from ldm.erasure.losses import SRSMELoss
from ldm.erasure.memory import GIB, estimate_memory, training_step_memory
from ldm.erasure.shift import SeparableShift
from ldm.erasure.training import training_loop


def measure(path, dtype, checkpointing: bool) -> int:
    """Return the most bytes that an iteration holds beside the weights, by torch's profiler."""
    model = load_model(path, CPU, dtype=dtype)
    layers, embeds = text_layers(model.denoiser), model.encode_prompt(["VanGogh", ""])
    latents = torch.randn(8, *model.latent_shape)

    def run():
        shift = SeparableShift.zeros(layers, torch.eye(40, 96), 1.0)
        loss = SRSMELoss(model, shift, embeds[:1], embeds[1:], 1.0)
        loss.checkpointing = checkpointing
        list(itertools.islice(training_loop(loss, noised_batches(model, latents, 8, 0), 0.1), 2))

    return peak(run)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "checkpointing"), [*itertools.product((torch.float32, torch.bfloat16), (False, True))]
)
def test_an_iterations_memory_is_estimated(tiny_path, dtype, checkpointing):
    pipe = hollow_pipeline(tiny_path)
    pipe.unet.requires_grad_(False).to(dtype=dtype, memory_format=torch.channels_last)
    estimate = training_step_memory(pipe, 8, 40, checkpointing, 64)
    assert estimate == pytest.approx(measure(tiny_path, dtype, checkpointing), rel=0.25)


@pytest.mark.slow
def test_the_first_choice_that_fits_is_marked(tiny_path, monkeypatch):
    table = estimate_memory(tiny_path, CPU, 8, 40)
    assert list(table["choice"]) == ["<-", "", "", "", ""]
    assert list(table["dtype"]) == ["float32"] * 2 + ["bfloat16"] * 2 + ["of the files"]
    assert table["beside them"][1] < table["beside them"][0] > table["beside them"][2] > table["beside them"][3]
    assert table["weights"][2] < table["weights"][0]
    less = 1.0001 * table["peak"][1] * GIB / 0.9
    monkeypatch.setattr("ldm.erasure.memory.total_memory", lambda device: less)
    assert list(estimate_memory(tiny_path, CPU, 8, 40)["choice"]) == ["", "<-", "", "", ""]
    monkeypatch.setattr("ldm.erasure.memory.total_memory", lambda device: 0)
    assert not any(estimate_memory(tiny_path, CPU, 8, 40)["choice"])


@pytest.mark.parametrize("name", ["xl", *MAKERS])
def test_every_family_is_estimated_from_configs_alone(name, tmp_path):
    folder = make_xl(tmp_path / "xl") if name == "xl" else make_family(name, tmp_path)
    for weights in folder.rglob("*.safetensors"):
        weights.unlink()
    table = estimate_memory(folder, CPU, 1, None)
    assert (table["weights"] > 0).all() and table["beside them"].iloc[-1] > 0
    assert table["peak"].notna().all() or name == "lumina2"
    is_mapped = table["weights"].iloc[-1] < table["weights"].iloc[2]  # of which the bfloat16 denoiser is a part
    assert is_mapped == (name != "xl")
