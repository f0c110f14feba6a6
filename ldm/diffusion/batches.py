"""Prompts through text encoders, some at a time, so that the hidden states of all are never held at once."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Protocol

import torch
from tqdm import tqdm

States = Mapping[tuple[str, int], torch.Tensor]  # by text encoder and layer: (N, T, width of that encoder)

PROMPTS_AT_ONCE = 64
_QUIET_SECONDS = 1.5  # before a progress bar shows


class _Encodes(Protocol):
    def encode_with_states(
        self, prompts: list[str], layers: Mapping[str, Collection[int]]
    ) -> tuple[torch.Tensor, States]: ...


def encode_in_batches(
    encoder: _Encodes,
    prompts: Sequence[str],
    layers: Mapping[str, Collection[int]],
    title: str = "",
    at_once: int = PROMPTS_AT_ONCE,
) -> Iterator[tuple[list[str], torch.Tensor, States]]:
    """Yield some prompts after the other, their embeddings (N, rows, d), and their hidden states after `layers`.

    With a `title` a progress bar shows where that takes a while.
    """
    starts: Sequence[int] = range(0, len(prompts), at_once)
    has_bar = title and len(starts) > 1
    for start in tqdm(starts, desc=title, unit="batch", delay=_QUIET_SECONDS, leave=False) if has_bar else starts:
        some = list(prompts[start : start + at_once])
        yield (some, *encoder.encode_with_states(some, layers))


def join_states(parts: Sequence[States]) -> States:
    """Return the hidden states of several batches as those of one, on the CPU."""
    return {key: torch.cat([part[key].cpu() for part in parts]) for key in (parts[0] if parts else ())}
