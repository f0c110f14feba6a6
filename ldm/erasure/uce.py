"""UCE, Unified Concept Editing (Gandikota et al., arXiv 2308.14761): equation 7, beside its formula.

For weights W (out, d) of a key or value layer, rows c_i of the erased concept with guides g_i, and rows c_j of what is
preserved, W* minimises

    s_e sum_i |W* c_i - W g_i|^2 + s_p sum_j |(W* - W) c_j|^2 + lambda |W* - W|^2,

and is `W + dW` with `dW = W K` and `K = s_e (G - C)^T C (lambda I + s_e C^T C + s_p R^T R)^-1`: one K for all layers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ldm.config.concepts import Concept
from ldm.config.peers import UCEConfig
from ldm.diffusion.model import DiffusionModel
from ldm.erasure.key_values import concept_rows, key_value_weights, prompt_rows
from ldm.erasure.shift import DenseShift


def uce_map(
    erased: torch.Tensor,
    guides: torch.Tensor,
    preserved: torch.Tensor,
    lamb: float = 0.5,
    erase_scale: float = 1.0,
    preserve_scale: float = 1.0,
) -> torch.Tensor:
    """Return K (d, d) with which each layer's change is `W K`, for rows `erased` and `guides` (n, d), `preserved`."""
    width = erased.shape[1]
    moved = erase_scale * (guides - erased).T @ erased  # (d, d)
    cost = lamb * torch.eye(width, dtype=erased.dtype, device=erased.device)
    cost = cost + erase_scale * erased.T @ erased + preserve_scale * preserved.T @ preserved
    return torch.linalg.solve(cost, moved.T).T  # the cost is symmetric


def solve_uce(model: DiffusionModel, concept: Concept, config: UCEConfig, preserved: Sequence[str]) -> DenseShift:
    """Return the shift that erases a concept by itself, while UCE preserves the prompts `preserved`."""
    erased, guides = concept_rows(model, concept, config)
    change = uce_map(
        erased,
        guides,
        prompt_rows(model, preserved, config.rows),
        config.lamb,
        config.erase_scale,
        config.preserve_scale,
    )
    return DenseShift({name: weight @ change for name, weight in key_value_weights(model).items()})
