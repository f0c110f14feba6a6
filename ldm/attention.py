"""Which weights an erasure changes, and scoped changes of the U-Net: of what layers put out, and of weights."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from copy import deepcopy
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

TRAIN_METHODS = ("xattn", "noxattn", "selfattn", "full", "notime", "xlayer", "selflayer")


def kv_layers(unet: nn.Module) -> dict[str, nn.Linear]:
    """All `attn2.to_k` and `attn2.to_v` layers by name, in the order of the U-Net's modules."""
    return {name: module for name, module in unet.named_modules() if name.endswith(("attn2.to_k", "attn2.to_v"))}


def trained(unet: nn.Module, method: str) -> list[str]:
    """The parameters that one of ESD's train methods (Gandikota et al., arXiv 2303.07345) changes, by name.

    xattn and selfattn: all cross- or self-attention; noxattn: all but cross-attention, time embedding and output; notime:
    all but the last two; full: all; xlayer: cross-attention of the first and last layer of the last but one up block that
    has any; selflayer: self-attention of the first layer of the last two such down blocks (in Stable Diffusion v1 the
    original's output blocks 6 and 8, and its input blocks 4 and 7).
    Raises ValueError for another method, or where the U-Net has no such layer.
    """
    if method not in TRAIN_METHODS:
        raise ValueError(f"unknown train method '{method}': choose one of {', '.join(TRAIN_METHODS)}")
    names = [name for name, _ in unet.named_parameters()]
    ends = ("conv_norm_out.", "conv_out.", "time_embedding.")

    def layers(side: str) -> list[list[str]]:
        """The layers with attention of each block of that side that has any."""
        blocks: dict[str, dict[str, None]] = {}
        for found in (re.match(rf"({side}_blocks\.\d+)\.attentions\.\d+\.", name) for name in names):
            if found:
                blocks.setdefault(found[1], {})[found[0]] = None
        return [list(block) for block in blocks.values()]

    up, down = layers("up"), layers("down")

    def chosen(name: str) -> bool:
        match method:
            case "xattn":
                return "attn2" in name
            case "selfattn":
                return "attn1" in name
            case "noxattn":
                return "attn2" not in name and not name.startswith(ends)
            case "notime":
                return not name.startswith(ends)
            case "xlayer":
                return "attn2" in name and name.startswith(tuple(layer for block in up[-2:][:1]
                                                                 for layer in (block[0], block[-1])))
            case "selflayer":
                return "attn1" in name and name.startswith(tuple(block[0] for block in down[-2:]))
        return True

    found = [name for name in names if chosen(name)]
    if not found:
        raise ValueError(f"this U-Net has nothing for --train_method {method}: choose another, such as xattn")
    return found


@contextmanager
def added(layers: Mapping[str, nn.Linear], extra: Mapping[str, Callable[[torch.Tensor], torch.Tensor]]) -> Iterator[None]:
    """While the block runs, layer `name` puts out `W x + extra[name](x)`; its weight is not touched."""
    with ExitStack() as stack:
        for name, add in extra.items():
            hook = layers[name].register_forward_hook(lambda _, inputs, output, add=add: output + add(inputs[0]))
            stack.callback(hook.remove)
        yield


@contextmanager
def swapped(unet: nn.Module, weights: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """While the block runs, the U-Net holds `weights` in place of its own of those names; then the very same are back."""
    base = {name: unet.get_parameter(name) for name in weights}

    def put(parameters: Mapping[str, nn.Parameter]) -> None:
        for name, parameter in parameters.items():
            owner, _, own = name.rpartition(".")
            setattr(unet.get_submodule(owner), own, parameter)

    try:
        put(weights)
        yield
    finally:
        put(base)


def sharing(unet: nn.Module, weights: Mapping[str, torch.Tensor]) -> nn.Module:
    """A U-Net of its own with `weights` in place of those of that name; all others are the very tensors of `unet`, which is not
    touched, so that several may run at once."""
    tensors = {id(tensor): tensor for tensor in (*unet.parameters(), *unet.buffers())}
    other = deepcopy(unet, tensors)
    for name, weight in weights.items():
        owner, _, own = name.rpartition(".")
        setattr(other.get_submodule(owner), own, nn.Parameter(weight, requires_grad=False))
    return other


@contextmanager
def recomputed(unet: nn.Module, scope: Callable[[], AbstractContextManager]) -> Iterator[None]:
    """While the block runs, the U-Net's blocks keep their inputs alone, and are run again, within `scope()`, when their
    gradient is wanted: less memory for more time (gradient checkpointing; Chen et al., arXiv 1604.06174)."""
    unet.enable_gradient_checkpointing(partial(checkpoint, use_reentrant=False, context_fn=lambda: (nullcontext(), scope())))
    try:
        yield
    finally:
        unet.disable_gradient_checkpointing()


@contextmanager
def score_differences(unet: nn.Module, anchor: torch.Tensor) -> Iterator[list[torch.Tensor]]:
    """While the block runs, every cross-attention layer adds to the list how its scores, before the softmax, differ from
    those under the prompt `anchor` (1, tokens, d): `scale q (k(c) - k(anchor))^T`, (N * heads, pixels, tokens).
    """
    differences: list[torch.Tensor] = []
    with ExitStack() as stack:
        for name, layer in unet.named_modules():
            if name.endswith("attn2"):
                query: list[torch.Tensor] = []

                def keep(_, inputs, output, query=query):
                    query[:] = [output]

                def compare(to_k, inputs, output, query=query, layer=layer):
                    key = output - F.linear(anchor, to_k.weight, to_k.bias)  # (N, tokens, inner)
                    q, k = (layer.head_to_batch_dim(part) for part in (query.pop(), key))
                    differences.append(layer.scale * q @ k.transpose(1, 2))

                stack.callback(layer.to_q.register_forward_hook(keep).remove)
                stack.callback(layer.to_k.register_forward_hook(compare).remove)
        yield differences
