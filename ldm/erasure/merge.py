"""TODO erasure.merge."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
import torch
from torch import nn
from ldm.diffusion.edits import replace_parameters
from ldm.erasure.shift import WeightShift


def merged_weight(weight: torch.Tensor, name: str, shifts: Sequence[WeightShift], dtype: torch.dtype | None = None) -> torch.Tensor:
    """`W + sum of dW` of one parameter: summed in float64 and rounded once, to `dtype` or the weight's own."""
    total = sum((shift.delta(name) for shift in shifts if name in shift.names), weight.detach().cpu().double())
    return total.to(weight.device, dtype or weight.dtype)


def merge(unet: nn.Module, shifts: Sequence[WeightShift], dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
    """`W + sum of dW` for the parameters that any shift changes, by `added_to`. Nothing is changed."""
    changed = dict.fromkeys(name for shift in shifts for name in shift.names)
    return {name: merged_weight(unet.get_parameter(name), name, shifts, dtype) for name in changed}


@contextmanager
def applied(unet: nn.Module, shifts: Sequence[WeightShift]) -> Iterator[None]:
    """While the block runs, the U-Net holds the merged weights; then the very same base tensors are back."""
    merged = {name: nn.Parameter(weight, requires_grad=False) for name, weight in merge(unet, shifts).items()}
    with replace_parameters(unet, merged):
        yield
