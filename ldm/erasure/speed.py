"""SPEED (Li et al., arXiv 2503.07392): a change of value layers inside the null space of a refined retain set.

With weights W (out, d) of a layer, columns C1 (d, n) of the erased concept, C* (d, n) those of its anchor, C2 (d, m)
what no prompt may change, and P the projection on directions in which the retain set has next to nothing,

    dW = W (C* C1^T - C1 C1^T) P Q M,    M = (C1 C1^T P + I)^-1,    Q = I - M C2 (C2^T P M C2)^+ C2^T P,

is the least of `|W C* - (W + dW) C1|^2 + |dW|^2` over changes `dW = dW P` with `dW C2 = 0` (equations 10 to 12). The
retain set is refined for each layer: see `refine`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ldm.config.concepts import Concept
from ldm.config.peers import SPEEDConfig
from ldm.diffusion.model import DiffusionModel
from ldm.erasure.key_values import concept_rows, invariant_rows, key_value_weights, prompt_rows
from ldm.erasure.shift import DenseShift


def constrained_change(
    erased: torch.Tensor, anchors: torch.Tensor, invariant: torch.Tensor, projection: torch.Tensor
) -> torch.Tensor:
    """Return K (d, d) with which a layer's change is `W K`.

    `erased` and `anchors` (n, d) are C1^T and C*^T, `invariant` (m, d) is C2^T, and `projection` is P (d, d).
    """
    identity = torch.eye(len(projection), dtype=projection.dtype, device=projection.device)
    m = torch.linalg.inv(erased.T @ erased @ projection + identity)
    held = m @ invariant.T  # (d, m)
    q = identity - held @ torch.linalg.pinv(invariant @ projection @ held, rtol=1e-9) @ invariant @ projection
    return (anchors - erased).T @ erased @ projection @ q @ m


def null_projection(retained: torch.Tensor, threshold: float) -> torch.Tensor:
    """Return P (d, d): the projection on singular vectors of the rows' mean `c c^T` with values below `threshold`."""
    vectors, values, _ = torch.linalg.svd(retained.T @ retained / max(1, len(retained)))
    free = vectors[:, values < threshold]
    return free @ free.T


def most_shifted(rows: torch.Tensor, erasing: torch.Tensor) -> torch.Tensor:
    """Return the rows whose prior shift `|dW c|`, by the change `erasing` (out, d), is above the mean of all (IPF)."""
    shifts = (rows @ erasing.T).norm(dim=1)
    return rows[shifts >= shifts.mean()]


def refine(
    weight: torch.Tensor, retained: torch.Tensor, erasing: torch.Tensor, config: SPEEDConfig, noise: torch.Generator
) -> torch.Tensor:
    """Return the retain set of a layer: the rows that erasing shifts most, and variants of them, of those likewise.

    Variants differ along the `augment_rank` directions that `weight` shrinks most (DPA, equations 7 and 8).
    """
    if not config.filter_retained or not len(retained):
        return retained
    kept = most_shifted(retained, erasing)
    least = torch.linalg.svd(weight).Vh[-config.augment_rank :]  # (r, d)
    repeated = kept.repeat(config.augmentations, 1)
    eps = torch.randn(repeated.shape, generator=noise, dtype=repeated.dtype)
    variants = repeated + eps @ least.T @ least
    return torch.cat([kept, most_shifted(variants, erasing)])


def solve_speed(model: DiffusionModel, concept: Concept, config: SPEEDConfig, preserved: Sequence[str]) -> DenseShift:
    """Return the shift that erases a concept by itself, with the prompts `preserved` as SPEED's retain set."""
    erased, anchors = concept_rows(model, concept, config)
    retained = prompt_rows(model, preserved, config.rows)
    invariant = invariant_rows(model, config.null_text_rows)
    identity = torch.eye(erased.shape[1], dtype=erased.dtype)
    unconstrained = (anchors - erased).T @ erased @ torch.linalg.inv(erased.T @ erased + identity)  # equation 4's
    noise = torch.Generator().manual_seed(config.seed)
    deltas: dict[str, torch.Tensor] = {}
    for name, weight in key_value_weights(model, config.layers).items():
        rows = refine(weight, retained, weight @ unconstrained, config, noise)
        projection = null_projection(rows, config.null_threshold)
        deltas[name] = weight @ constrained_change(erased, anchors, invariant, projection)
    return DenseShift(deltas)
