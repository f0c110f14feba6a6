"""Norms of what matrices make of prompts' embeddings, (out, d) each, however many they are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch

_PROMPTS_AT_ONCE = 64  # whose embeddings are multiplied together


def stacked_qr_factor(matrices: Iterable[torch.Tensor], width: int) -> torch.Tensor:
    """Return a triangle R (at most d, d), float64: `|e R^T|` is the norm of what `matrices` (out, d) make of e (d,)."""
    stacked = [matrix.detach().cpu().double() for matrix in matrices]
    return torch.linalg.qr(torch.cat(stacked), mode="r").R if stacked else torch.zeros(1, width, dtype=torch.float64)


def output_norms(matrices: Iterable[torch.Tensor], embeds: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """Return the norm of what all `matrices` (out, d) together make of each prompt's embedding (tokens, d)."""
    if not embeds:
        return {}
    return norms_through((stacked_qr_factor(matrices, next(iter(embeds.values())).shape[-1]),), embeds)


def norms_through(factors: Sequence[torch.Tensor], embeds: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """Return the norm of what matrices (out, d), one after the other, make of each prompt's embedding (tokens, d)."""
    norms: dict[str, float] = {}
    prompts = list(embeds)
    for start in range(0, len(prompts), _PROMPTS_AT_ONCE):
        some = prompts[start : start + _PROMPTS_AT_ONCE]
        rows = torch.cat([embeds[prompt].cpu() for prompt in some]).double()  # (all tokens, d)
        for factor in factors:
            rows = rows @ factor.T
        lengths = torch.tensor([len(embeds[prompt]) for prompt in some])
        owners = torch.arange(len(some)).repeat_interleave(lengths)
        squares = torch.zeros(len(some), dtype=rows.dtype).index_add(0, owners, rows.square().sum(dim=1))
        norms |= dict(zip(some, squares.sqrt().tolist(), strict=True))
    return norms
