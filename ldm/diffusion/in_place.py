"""The weights of a pipeline's text layers, changed where they lie, and put back bit by bit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ldm.diffusion.family import unwrapped
from ldm.diffusion.text_layers import TextLayers, text_layers

Weights = dict[str, torch.Tensor]  # of text layers, by the layer's name
_HALVES = torch.bfloat16, torch.float16
# Through these, one after the other, weights may have gone on their way to the dtype that they have now.
_ROUNDINGS: list[tuple[torch.dtype, ...]] = [(), *((half,) for half in _HALVES), _HALVES, _HALVES[::-1]]


class InPlaceWeights:
    """The text layers of a pipeline's denoiser, whose tensors stay the very same while their values are changed.

    So a LoRA around a layer goes on acting on it, and what `torch.compile` has made goes on being used. The values of
    before are kept on the CPU.
    """

    def __init__(self, pipe: Any, part: str):
        """`part` is what the pipeline calls its denoiser."""
        self._pipe, self._part = pipe, part
        self._base: Weights = {}  # of before, empty where nothing is changed
        self._left: Weights = {}  # what was written last

    @property
    def denoiser(self) -> Any:
        """Return the denoiser that the pipeline has now."""
        return unwrapped(getattr(self._pipe, self._part))

    def layers(self) -> TextLayers:
        """Return the text layers by name. Raises ValueError, with what to do, where their weights are out of reach."""
        layers = text_layers(self.denoiser)
        name = type(self._pipe).__name__
        weights = [layer.weight for layer in layers.values()]
        if any(weight.is_meta for weight in weights) or _is_group_offloaded(self.denoiser):
            raise ValueError(
                f"the weights of this {name} are not where they could be changed, as by "
                "`enable_sequential_cpu_offload` or `enable_group_offload`: call `pipe.remove_all_hooks()` before, or "
                "use `enable_model_cpu_offload`, or the form gated"
            )
        if not all(type(weight) is nn.Parameter and _is_whole(weight) for weight in weights):
            raise ValueError(
                f"the weights of this {name} are quantized, and cannot be changed: use the form gated, load the "
                "weights unquantized, or erase from those, export a LoRA and load it beside the quantized ones"
            )
        blocks = {self.denoiser.get_submodule(layer.rpartition(".")[0]) for layer in layers}
        if any(getattr(block, "fused_projections", False) for block in blocks):
            raise ValueError(
                f"the projections of this {name} are fused, and its denoiser uses copies of the weights: call "
                "`pipe.unfuse_qkv_projections()` before"
            )
        return layers

    def base(self) -> Weights:
        """Return the weights of before anything was changed, on the CPU. Raises ValueError as `write`."""
        self._checked_layers()
        return self._base

    def write(self, weights: Mapping[str, torch.Tensor] | None) -> None:
        """Let the layers have these weights, or, where they are None, those of before.

        Raises ValueError, and changes nothing, where the weights are out of reach or not as they were left.
        """
        layers = self._checked_layers()
        written = self._base if weights is None else dict(weights)
        try:
            _copy(written, layers)
        except BaseException:  # an interrupt in the midst of it
            _copy(self._left, layers)
            raise
        self._left = written

    def forget(self) -> None:
        """Forget what the weights were before, which are from now on whatever they are."""
        self._base, self._left = {}, {}

    def _checked_layers(self) -> TextLayers:
        """Return the text layers, whose weights are as they were left, or now are what they were before."""
        layers = self.layers()
        if not self._base:
            self._base = {name: layer.weight.detach().cpu().clone() for name, layer in layers.items()}
            self._left = self._base
        dtype = next(iter(layers.values())).weight.dtype
        through = self._rounded_through(layers, dtype)
        is_base = self._left is self._base
        self._base = _rounded(self._base, (*(through or ()), dtype))  # as `pipe.to` rounds both alike
        self._left = self._base if is_base else _rounded(self._left, (*(through or ()), dtype))
        if through is not None:
            return layers
        for name, layer in layers.items():
            if name not in self._left or not _is_same(layer.weight.detach().cpu(), self._left[name]):
                raise ValueError(
                    f"the weights of {name} are not as they were left when concepts were erased, as after "
                    "`fuse_lora`, `unfuse_lora` or another denoiser: undo that first, and fuse a LoRA before anything "
                    "is erased, or use it without fusing"
                )
        return layers

    def _rounded_through(self, layers: Mapping[str, nn.Linear], dtype: torch.dtype) -> tuple[torch.dtype, ...] | None:
        """Return through which other dtypes the weights went since they were left, to their own; None if changed."""
        for dtypes in _ROUNDINGS:
            left = _rounded(self._left, (*dtypes, dtype))
            if all(name in left and torch.equal(layer.weight.cpu(), left[name]) for name, layer in layers.items()):
                return dtypes
        return None


def _rounded(weights: Weights, dtypes: Sequence[torch.dtype]) -> Weights:
    """Return weights rounded to several dtypes, one after the other; the very same where these are their own."""
    if all(weight.dtype == dtype for weight in weights.values() for dtype in dtypes):
        return weights
    rounded = weights
    for dtype in dtypes:
        rounded = {name: weight.to(dtype) for name, weight in rounded.items()}
    return rounded


def _is_whole(weight: torch.Tensor) -> bool:
    """Return whether a weight has numbers that a change can be added to: bytes are codes, or round too much."""
    return weight.is_floating_point() and weight.element_size() > 1


def _is_group_offloaded(denoiser: nn.Module) -> bool:
    """Return whether diffusers brings weights from copies of their own, in which a change would be lost."""
    registries = [getattr(module, "_diffusers_hook", None) for module in denoiser.modules()]
    return any(registry is not None and registry.get_hook("group_offloading") is not None for registry in registries)


@torch.no_grad()
def _copy(weights: Mapping[str, torch.Tensor], layers: Mapping[str, nn.Linear]) -> None:
    for name, layer in layers.items():
        layer.weight.copy_(weights[name])


def _is_same(weight: torch.Tensor, left: torch.Tensor) -> bool:
    """Return whether a weight is what it was left as, up to the rounding of a LoRA that was fused and taken out."""
    if torch.equal(weight, left):
        return True
    if weight.shape != left.shape or weight.dtype != left.dtype:
        return False
    difference = (weight.double() - left.double()).norm()
    return bool(difference <= torch.finfo(weight.dtype).eps * left.double().norm())
