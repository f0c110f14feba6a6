"""The cross-attention layers that see only the prompt, and scoped changes of what they put out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
from torch import nn


def kv_layers(unet: nn.Module) -> dict[str, nn.Linear]:
    """All `attn2.to_k` and `attn2.to_v` layers by name, in the order of the U-Net's modules."""
    return {name: module for name, module in unet.named_modules() if name.endswith(("attn2.to_k", "attn2.to_v"))}


@contextmanager
def added(layers: Mapping[str, nn.Linear], extra: Mapping[str, Callable[[torch.Tensor], torch.Tensor]]) -> Iterator[None]:
    """While the block runs, layer `name` puts out `W x + extra[name](x)`; its weight is not touched."""
    with ExitStack() as stack:
        for name, add in extra.items():
            hook = layers[name].register_forward_hook(lambda _, inputs, output, add=add: output + add(inputs[0]))
            stack.callback(hook.remove)
        yield
