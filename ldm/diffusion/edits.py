"""TODO diffusion.edits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from copy import deepcopy
from functools import partial
import torch
from torch import nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint


@contextmanager
def add_layer_outputs(layers: Mapping[str, nn.Linear], extra: Mapping[str, Callable[[torch.Tensor], torch.Tensor]]) -> Iterator[None]:
    """While the block runs, layer `name` puts out `W x + extra[name](x)`; its weight is not touched."""
    with ExitStack() as stack:
        for name, add in extra.items():
            hook = layers[name].register_forward_hook(lambda _, inputs, output, add=add: output + add(inputs[0]))
            stack.callback(hook.remove)
        yield


@contextmanager
def replace_parameters(unet: nn.Module, weights: Mapping[str, nn.Parameter]) -> Iterator[None]:
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


def clone_sharing_weights(unet: nn.Module, weights: Mapping[str, torch.Tensor]) -> nn.Module:
    """A U-Net of its own with `weights` in place of those of that name; all others are the very tensors of `unet`, which is not
    touched, so that several may run at once."""
    tensors = {id(tensor): tensor for tensor in (*unet.parameters(), *unet.buffers())}
    other = deepcopy(unet, tensors)
    for name, weight in weights.items():
        owner, _, own = name.rpartition(".")
        setattr(other.get_submodule(owner), own, nn.Parameter(weight, requires_grad=False))
    return other


@contextmanager
def gradient_checkpointing(unet: nn.Module, scope: Callable[[], AbstractContextManager]) -> Iterator[None]:
    """While the block runs, the U-Net's blocks keep their inputs alone, and are run again, within `scope()`, when their
    gradient is wanted: less memory for more time (gradient checkpointing; Chen et al., arXiv 1604.06174)."""
    unet.enable_gradient_checkpointing(partial(checkpoint, use_reentrant=False, context_fn=lambda: (nullcontext(), scope())))
    try:
        yield
    finally:
        unet.disable_gradient_checkpointing()


@contextmanager
def attention_score_differences(unet: nn.Module, anchor: torch.Tensor) -> Iterator[list[torch.Tensor]]:
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
