"""Changes of a U-Net's layers and weights, and of a model's embeddings, that last as long as a `with` block."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from copy import deepcopy
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from ldm.diffusion.text_model import EmbeddingEdit, TextModel


@contextmanager
def add_layer_outputs(
    layers: Mapping[str, nn.Linear], additions: Mapping[str, Callable[[torch.Tensor], torch.Tensor]]
) -> Iterator[None]:
    """Make layer `name` return `W x + additions[name](x)` while the block runs; its weight is not touched."""

    def make_hook(addition: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., torch.Tensor]:
        return lambda _, inputs, output: output + addition(inputs[0])

    with ExitStack() as stack:
        for name, addition in additions.items():
            stack.callback(layers[name].register_forward_hook(make_hook(addition)).remove)
        yield


def _set_parameters(unet: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
    for name, parameter in parameters.items():
        module_name, _, parameter_name = name.rpartition(".")
        setattr(unet.get_submodule(module_name), parameter_name, parameter)


@contextmanager
def replace_parameters(unet: nn.Module, parameters: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Put `parameters` in place of the U-Net's own of those names while the block runs; then the very same are back."""
    originals = {name: unet.get_parameter(name) for name in parameters}
    try:
        _set_parameters(unet, parameters)
        yield
    finally:
        _set_parameters(unet, originals)


def clone_sharing_weights(unet: nn.Module, weights: Mapping[str, torch.Tensor]) -> nn.Module:
    """Return a second U-Net with `weights` in place of those of that name.

    All others are the very tensors of `unet`, which is not touched, so that several may run at once.
    """
    shared: dict[int, Any] = {id(tensor): tensor for tensor in (*unet.parameters(), *unet.buffers())}
    clone = deepcopy(unet, shared)
    _set_parameters(clone, {name: nn.Parameter(weight, requires_grad=False) for name, weight in weights.items()})
    return clone


@contextmanager
def gradient_checkpointing(unet: Any, scope: Callable[[], AbstractContextManager[Any]]) -> Iterator[None]:
    """Keep the inputs of the U-Net's blocks alone, and run these again, within `scope()`, when a gradient is computed.

    That takes less memory and more time (Chen et al., arXiv 1604.06174). It ends with the `with` block.
    """
    unet.enable_gradient_checkpointing(
        partial(checkpoint, use_reentrant=False, context_fn=lambda: (nullcontext(), scope()))
    )
    try:
        yield
    finally:
        unet.disable_gradient_checkpointing()


@contextmanager
def edit_embeddings(model: TextModel, edit: EmbeddingEdit | None) -> Iterator[None]:
    """Let `edit` act on every prompt that the model embeds while the block runs, the negative and the empty one too.

    None lets none act.
    """
    before = model.embedding_edit
    model.embedding_edit = edit
    try:
        yield
    finally:
        model.embedding_edit = before


@contextmanager
def remember_embeddings(model: TextModel) -> Iterator[None]:
    """Let `embed_prompts` embed each prompt once while the block runs, and keep what it made until then."""
    before = model.remembered
    model.remembered = {} if before is None else before
    try:
        yield
    finally:
        model.remembered = before


@contextmanager
def attention_score_differences(denoiser: nn.Module, anchor: torch.Tensor) -> Iterator[list[torch.Tensor]]:
    """Collect how attention scores differ from those under an anchor prompt while the block runs.

    Every cross-attention layer adds one tensor (N * heads, pixels, tokens) to the list: the difference of the scores
    before the softmax, `scale q (k(c) - k(anchor))^T`. `anchor` (1, tokens, d) is what keys are made of under it.
    """
    differences: list[torch.Tensor] = []
    with ExitStack() as stack:
        for name, layer in denoiser.named_modules():
            if name.endswith("attn2"):
                to_q, to_k = layer.get_submodule("to_q"), layer.get_submodule("to_k")
                store_query, compare_key = _score_hooks(layer, anchor, differences)
                stack.callback(to_q.register_forward_hook(store_query).remove)
                stack.callback(to_k.register_forward_hook(compare_key).remove)
        yield differences


def _score_hooks(
    layer: Any, anchor: torch.Tensor, differences: list[torch.Tensor]
) -> tuple[Callable[..., None], Callable[..., None]]:
    """Return forward hooks for an attention layer's `to_q` and `to_k`, which runs after it and fills `differences`."""
    query: list[torch.Tensor] = []

    def store_query(_: nn.Module, inputs: Any, output: torch.Tensor) -> None:
        query[:] = [output]

    def compare_key(to_k: Any, inputs: Any, output: torch.Tensor) -> None:
        key = output - F.linear(anchor, to_k.weight, to_k.bias)  # (N, tokens, inner)
        q, k = (
            layer.head_to_batch_dim(projection) for projection in (query.pop(), key)
        )  # (N * heads, ..., inner / heads)
        differences.append(layer.scale * q @ k.transpose(1, 2))

    return store_query, compare_key
