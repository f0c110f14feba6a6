"""What the plan foresees is what a step takes."""

import itertools

import pytest
import torch
from diffusers import UNet2DConditionModel

from ldm.attention import kv_layers
from ldm.latents import noisy
from ldm.losses import SeparableErasure
from ldm.model import load
from ldm.plan import GIB, plan, step_memory
from ldm.shift import SeparableShift
from ldm.training import erase

from bench.bench import peak
from conftest import CPU, make_xl


def measured(path, dtype, checkpointing: bool) -> int:
    """The most bytes that a step makes beside the weights, by torch's profiler."""
    model = load(path, CPU, dtype=dtype)
    layers, prompts = kv_layers(model.unet), model.encode_prompt(["VanGogh", ""])
    latents = torch.randn(8, *model.latent_shape)

    def run():
        shift = SeparableShift.zeros(layers, torch.eye(40, 96), 1.0)
        loss = SeparableErasure(model, layers, shift, prompts[:1], prompts[1:], 1.0)
        loss.checkpointing = checkpointing
        list(itertools.islice(erase(loss, loss.parameters(), noisy(model, latents, 8, 0), 0.1), 2))

    return peak(run)


@pytest.mark.parametrize("dtype, checkpointing", [*itertools.product((torch.float32, torch.bfloat16), (False, True))])
def test_a_steps_memory_is_foreseen(tiny_path, dtype, checkpointing):
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(tiny_path, subfolder="unet"))
    unet.requires_grad_(False).to(dtype=dtype, memory_format=torch.channels_last)
    foreseen = step_memory(unet, 8, 16, 40, checkpointing, 64)
    assert foreseen == pytest.approx(measured(tiny_path, dtype, checkpointing), rel=0.25)


def test_the_first_choice_that_fits_is_marked(tiny_path, monkeypatch):
    table = plan(tiny_path, CPU, 8, 40)
    assert list(table["choice"]) == ["<-", "", "", ""] and list(table["dtype"]) == ["float32"] * 2 + ["bfloat16"] * 2
    assert table["step"][1] < table["step"][0] > table["step"][2] > table["step"][3]
    assert table["weights"][2] < table["weights"][0]
    less = 1.0001 * table["peak"][1] * GIB / 0.9
    monkeypatch.setattr("ldm.plan.total_memory", lambda device: less)
    assert list(plan(tiny_path, CPU, 8, 40)["choice"]) == ["", "<-", "", ""]
    monkeypatch.setattr("ldm.plan.total_memory", lambda device: 0)
    assert not any(plan(tiny_path, CPU, 8, 40)["choice"])


def test_xl_is_not_foreseen(tmp_path):
    with pytest.raises(ValueError, match="not for XL.*--gradient_checkpointing"):
        plan(make_xl(tmp_path / "xl"), CPU, 1, None)
