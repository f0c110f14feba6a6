"""What text layers see of a prompt's rows: all of them, or, where a denoiser has several streams, its own columns.

A mapping of plain layers sees all. One of several streams says so itself, as `ldm.diffusion.text_layers.TextLayers`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Protocol, runtime_checkable

import torch
from torch import nn


@runtime_checkable
class Streams(Protocol):
    """Text layers that know which columns of a prompt's rows (T + 1, width) each of them sees."""

    @property
    def width(self) -> int:
        """How wide a prompt's rows are."""
        ...

    @property
    def streams(self) -> list[slice]:
        """The columns of a prompt's rows that are each stream's."""
        ...

    @property
    def stream_names(self) -> list[str]:
        """What each of `streams` is called."""
        ...

    def row_weight(self, name: str) -> torch.Tensor:
        """Return what a layer's weight makes of a prompt's rows, (out, width)."""
        ...

    def in_weight(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        """Return what acts on a prompt's rows (n, width) as it acts on a layer's input, (n, in)."""
        ...

    def as_rows(self, name: str, delta: torch.Tensor) -> torch.Tensor:
        """Return what acts on a layer's input (n, in) as it acts on a prompt's rows, (n, width)."""
        ...


Layers = Mapping[str, nn.Linear]


def row_weight(layers: Layers, name: str) -> torch.Tensor:
    """Return what a layer's weight makes of a prompt's rows, (out, width)."""
    return layers.row_weight(name) if isinstance(layers, Streams) else layers[name].weight.detach()


def in_weight(layers: Layers, name: str, rows: torch.Tensor) -> torch.Tensor:
    """Return what acts on a prompt's rows (n, width) as it acts on a layer's input, (n, in)."""
    return layers.in_weight(name, rows) if isinstance(layers, Streams) and name in layers else rows


def as_rows(layers: Layers, name: str, delta: torch.Tensor) -> torch.Tensor:
    """Return what acts on a layer's input (n, in) as it acts on a prompt's rows, (n, width)."""
    return layers.as_rows(name, delta) if isinstance(layers, Streams) and name in layers else delta


def stream_columns(layers: Layers, width: int) -> list[slice]:
    """Return the columns of a prompt's rows (T + 1, width) that are each stream's: of plain layers all."""
    return layers.streams if isinstance(layers, Streams) else [slice(0, width)]


def lacking(layers: Layers, width: int) -> int:
    """Return how many columns a prompt's rows have beyond the first `width`, those of its tokens."""
    return max(0, layers.width - width) if isinstance(layers, Streams) else 0


class Products(Mapping[str, torch.Tensor]):
    """`W A` (out, k) for the weights W that text layers have now, each made when it is asked for."""

    def __init__(self, layers: Mapping[str, nn.Linear], outputs: torch.Tensor):
        self.layers, self.outputs = layers, outputs
        self.weights = {name: layer.weight.detach() for name, layer in layers.items()}  # which may be replaced later

    def __getitem__(self, name: str) -> torch.Tensor:
        return as_rows(self.layers, name, self.weights[name]).cpu().double() @ self.outputs

    def __iter__(self) -> Iterator[str]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)
