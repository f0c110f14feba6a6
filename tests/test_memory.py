"""The estimate of memory is what an iteration takes."""

import itertools

import pytest
import torch
from bench.bench import peak
from conftest import CPU, make_xl
from diffusers import UNet2DConditionModel

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
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(tiny_path, subfolder="unet"))
    unet.requires_grad_(False).to(dtype=dtype, memory_format=torch.channels_last)
    estimate = training_step_memory(unet, 8, 16, 40, checkpointing, 64)
    assert estimate == pytest.approx(measure(tiny_path, dtype, checkpointing), rel=0.25)


@pytest.mark.slow
def test_the_first_choice_that_fits_is_marked(tiny_path, monkeypatch):
    table = estimate_memory(tiny_path, CPU, 8, 40)
    assert list(table["choice"]) == ["<-", "", "", ""]
    assert list(table["dtype"]) == ["float32"] * 2 + ["bfloat16"] * 2
    assert table["iteration"][1] < table["iteration"][0] > table["iteration"][2] > table["iteration"][3]
    assert table["weights"][2] < table["weights"][0]
    less = 1.0001 * table["peak"][1] * GIB / 0.9
    monkeypatch.setattr("ldm.erasure.memory.total_memory", lambda device: less)
    assert list(estimate_memory(tiny_path, CPU, 8, 40)["choice"]) == ["", "<-", "", ""]
    monkeypatch.setattr("ldm.erasure.memory.total_memory", lambda device: 0)
    assert not any(estimate_memory(tiny_path, CPU, 8, 40)["choice"])


def test_xl_is_not_estimated(tmp_path):
    with pytest.raises(ValueError, match=r"not for XL.*`gradient_checkpointing`"):
        estimate_memory(make_xl(tmp_path / "xl"), CPU, 1, None)
