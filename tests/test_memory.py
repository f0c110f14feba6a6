"""What the plan foresees is what a step takes."""

import itertools

import pytest
import torch
from diffusers import UNet2DConditionModel

from ldm.diffusion.text_layers import text_layers
from ldm.diffusion.latents import noised_batches
from ldm.erasure.losses import SRSMELoss
from ldm.diffusion.load import load_model
from ldm.erasure.memory import GIB, estimate_memory, training_step_memory
from ldm.erasure.shift import SeparableShift
from ldm.erasure.training import training_loop

from bench.bench import peak
from conftest import CPU, make_xl


def measured(path, dtype, checkpointing: bool) -> int:
    """The most bytes that a step makes beside the weights, by torch's profiler."""
    model = load_model(path, CPU, dtype=dtype)
    layers, prompts = text_layers(model.unet), model.encode_prompt(["VanGogh", ""])
    latents = torch.randn(8, *model.latent_shape)

    def run():
        shift = SeparableShift.zeros(layers, torch.eye(40, 96), 1.0)
        loss = SRSMELoss(model, layers, shift, prompts[:1], prompts[1:], 1.0)
        loss.checkpointing = checkpointing
        list(itertools.islice(training_loop(loss, loss.parameters(), noised_batches(model, latents, 8, 0), 0.1), 2))

    return peak(run)


@pytest.mark.parametrize("dtype, checkpointing", [*itertools.product((torch.float32, torch.bfloat16), (False, True))])
def test_a_steps_memory_is_foreseen(tiny_path, dtype, checkpointing):
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(tiny_path, subfolder="unet"))
    unet.requires_grad_(False).to(dtype=dtype, memory_format=torch.channels_last)
    foreseen = training_step_memory(unet, 8, 16, 40, checkpointing, 64)
    assert foreseen == pytest.approx(measured(tiny_path, dtype, checkpointing), rel=0.25)


def test_the_first_choice_that_fits_is_marked(tiny_path, monkeypatch):
    table = estimate_memory(tiny_path, CPU, 8, 40)
    assert list(table["choice"]) == ["<-", "", "", ""] and list(table["dtype"]) == ["float32"] * 2 + ["bfloat16"] * 2
    assert table["step"][1] < table["step"][0] > table["step"][2] > table["step"][3]
    assert table["weights"][2] < table["weights"][0]
    less = 1.0001 * table["peak"][1] * GIB / 0.9
    monkeypatch.setattr("ldm.plan.total_memory", lambda device: less)
    assert list(estimate_memory(tiny_path, CPU, 8, 40)["choice"]) == ["", "<-", "", ""]
    monkeypatch.setattr("ldm.plan.total_memory", lambda device: 0)
    assert not any(estimate_memory(tiny_path, CPU, 8, 40)["choice"])


def test_xl_is_not_foreseen(tmp_path):
    with pytest.raises(ValueError, match="not for XL.*--gradient_checkpointing"):
        estimate_memory(make_xl(tmp_path / "xl"), CPU, 1, None)
