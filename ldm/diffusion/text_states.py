"""The hidden states of a text encoder, as they are while it runs."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

LAST_STATE = -1  # what the denoiser is given, whatever a pipeline takes for it


def text_encoder_layers(encoder: Any) -> list[nn.Module]:
    """Return the layers of a text encoder of transformers, in order. Raises ValueError where they are not found."""
    number = encoder.config.get_text_config().num_hidden_layers
    for module in encoder.modules():
        if isinstance(module, nn.ModuleList) and len(module) == number:
            return list(module)
    raise ValueError(f"{type(encoder).__name__} has no list of {number} layers, whose outputs a gate could read")


@contextmanager
def capture_states(encoder: Any, layers: Collection[int]) -> Iterator[dict[int, torch.Tensor]]:
    """Collect the outputs (N, T, d) of `layers`, counted from 0, of a text encoder that runs in the block."""
    states: dict[int, torch.Tensor] = {}

    def make_hook(number: int) -> Callable[..., None]:
        def keep(_: nn.Module, inputs: Any, output: Any) -> None:
            states[number] = output[0] if isinstance(output, tuple) else output

        return keep

    modules = text_encoder_layers(encoder) if layers else []
    with ExitStack() as stack:
        for number in layers:
            stack.callback(modules[number].register_forward_hook(make_hook(number)).remove)
        yield states
