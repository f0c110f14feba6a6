"""The closed form: the cheapest change inside a null space that gives a concept its anchor's outputs.

A text layer with weights W (out, d) sees the rows of a prompt's embedding and nothing else. With X the rows of the
concept's prompts, Y those of the anchor, S (k, d) orthonormal directions of the null space and C (k, k) what acting
along them costs, the shift of a concept minimises

    |X (W + dW)^T - Y W^T|^2 + tr(w C w^T)    over    dW = w S.

Its solution is `w = W A` with `A = (Y - X)^T P (P^T P + C)^-1` and `P = X S^T`: one A (d, k) for all layers, so that
`(W + dW) e = W (e + A S e)`. (Closed forms edit attention since TIME, arXiv 2303.08084, and UCE, 2308.14761; within a
null space SPEED, 2503.07392.)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ldm.erasure.null_space import qr_factor

# The smallest projection for the root of its cost, g: the closed form goes g^2 / (1 + g^2) of the way along it.
MIN_GAIN = 0.03
_RELATIVE_ZERO = 1e-7


class NoProjectionError(ValueError):
    """Say that a concept has no projection on the null space, in which nothing can erase it alone."""


@dataclass(frozen=True)
class Costs:
    """What a change costs: its size, and what it does to protected prompts and to everything else that should stay.

    `ridge_weight` weighs |v|^2 relative to the concept's largest projection, `preserve_scale` the protected prompts,
    which a coarse tolerance lets change a little; `preserve_gram` (d, d) is the sum of `e^T e` over what else should
    change little, with its weight.
    """

    ridge_weight: float
    preserve_scale: float
    preserve_gram: torch.Tensor


@dataclass(frozen=True)
class ErasureSpace:
    """Orthonormal directions (k, d) in the null space along which a shift acts, best first; and their cost (k, k)."""

    directions: torch.Tensor
    cost: torch.Tensor


def erasure_space(
    basis: torch.Tensor,
    protected_rows: torch.Tensor,
    target_embeds: torch.Tensor,
    costs: Costs,
    max_directions: int | None = None,
) -> ErasureSpace:
    """Return where a shift erasing `target_embeds` (P, tokens, d) should act: up to `max_directions` in `basis` (m, d).

    A change along direction v costs `|v|^2 ridge_weight s^2 + preserve_scale |E v|^2 + v preserve_gram v^T`, with s the
    largest projection of the concept on a direction of the null space and E the protected prompts (`protected_rows`,
    (r, d)). The directions are those with the most projection for their cost: the right singular vectors of `X S^T
    C^(-1/2)`, down to a value of `MIN_GAIN`, led back through `C^(-1/2) S`. Beyond them a gradient on the concept's
    prompts hardly acts, yet Adam changes every coefficient alike. Raises NoProjectionError where the concept has no
    projection: what is protected says all of it, and ValueError for a cost beyond what numbers can hold.
    """
    if not len(basis):
        raise NoProjectionError("the protected prompts leave no direction free: protect fewer, or raise `rank_rtol`")
    null_basis = torch.linalg.qr(basis.T).Q.T  # S (m, d)
    target_rows = qr_factor(target_embeds.flatten(0, 1))  # (at most d, d), with the projections of all P * tokens rows
    projection = target_rows @ null_basis.T
    is_tall = len(projection) > len(null_basis)
    gram = projection.T @ projection if is_tall else projection @ projection.T
    size = torch.linalg.eigvalsh(gram)[-1].clamp(min=0).sqrt()  # the largest singular value
    if size <= _RELATIVE_ZERO * target_rows.norm():
        raise NoProjectionError(
            "the protected prompts say all that the concept says, so that nothing can erase it alone: "
            "protect fewer, or raise `rank_rtol`"
        )
    leakage = protected_rows @ null_basis.T
    identity = torch.eye(len(null_basis), dtype=projection.dtype)
    cost = (
        costs.ridge_weight * size.square() * identity
        + costs.preserve_scale * leakage.T @ leakage
        + null_basis @ costs.preserve_gram @ null_basis.T
    )
    root, failed = torch.linalg.cholesky_ex(cost)
    if failed or not root.isfinite().all():
        raise ValueError(
            "the cost of a change overflows, or is nothing: choose other values of `ridge_weight`, "
            "`preserve_scale`, `vocab_preserve_scale` and the other scales"
        )
    whitened = torch.linalg.solve_triangular(root, projection.T, upper=False).T  # X S^T L^-T with C = L L^T
    _, gain, vh = torch.linalg.svd(whitened, full_matrices=False)
    num_directions = min(max(1, int((gain > MIN_GAIN).sum())), max_directions or len(gain))
    chosen = torch.linalg.solve_triangular(root.T, vh[:num_directions].T, upper=True).T  # (k, m)
    chosen = torch.linalg.qr(chosen.T).Q.T  # whose first rows span what the first rows spanned
    return ErasureSpace(chosen @ null_basis, chosen @ cost @ chosen.T)


def closed_form_map(space: ErasureSpace, target_embeds: torch.Tensor, anchor_embeds: torch.Tensor) -> torch.Tensor:
    """Return A (d, k), float64, sending `target_embeds` towards `anchor_embeds`, both (P, tokens, d), token by token.

    The module's docstring has the formula. An anchor of one prompt, (1, tokens, d), serves all of the concept's.
    """
    targets, anchors = (
        rows.flatten(0, 1).cpu().double() for rows in (target_embeds, anchor_embeds.expand_as(target_embeds))
    )
    projection = targets @ space.directions.T  # P
    gram = projection.T @ projection + space.cost
    return torch.linalg.solve(gram, projection.T @ (anchors - targets)).T
