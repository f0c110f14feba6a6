"""Maps of embeddings: what a prompt that says a concept becomes, E -> E + E (A S)^T.

A S is the ridge regression of the rows of the concept's prompts onto those of their anchors. Maps of several concepts
overshoot when they are added up, since each one accounts for all of a prompt; so each keeps its normal equations, from
which `join_maps` solves the one map that is fitted on the rows of all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

_RELATIVE_ZERO = 1e-6


@dataclass(frozen=True)
class EmbeddingMap:
    """`e -> e + A S e`: `outputs` A (d, k), orthonormal `directions` S (k, d), and the normal equations of A.

    `gram` (k, k) is the mean of `p^T p` over the rows it was fitted on, p their projections on S, with the ridge's
    `penalty` on its diagonal. All are float64.
    """

    outputs: torch.Tensor
    directions: torch.Tensor
    gram: torch.Tensor
    penalty: float

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """Return what the map makes of rows (..., d), in their own dtype."""
        precise = rows.double()
        added = precise @ self.directions.to(rows.device).T @ self.outputs.to(rows.device).T
        return (precise + added).to(rows.dtype)


def fit_map(targets: torch.Tensor, anchors: torch.Tensor, ridge: float, rank: int) -> EmbeddingMap:
    """Return the map of rows `targets` (n, d) to `anchors` (n, d), in the `rank` main directions of the targets.

    `ridge` is relative to the largest mean square of a projection.
    """
    targets = targets.double()
    moments = targets.T @ targets / len(targets)  # (d, d)
    values, vectors = torch.linalg.eigh(moments)  # the largest last
    directions = vectors[:, -min(rank, len(targets), len(values)) :].T
    projections = targets @ directions.T  # (n, k)
    penalty = ridge * float(values[-1])
    eye = torch.eye(len(directions), dtype=torch.float64)
    gram = projections.T @ projections / len(targets) + penalty * eye
    cross = (anchors.double() - targets).T @ projections / len(targets)  # (d, k)
    return EmbeddingMap(torch.linalg.solve(gram, cross.T).T, directions, gram, penalty)


def join_maps(maps: Sequence[EmbeddingMap]) -> EmbeddingMap:
    """Return the one map that is fitted on the rows of all `maps`, from their normal equations."""
    if len(maps) == 1:
        return maps[0]
    _, values, vh = torch.linalg.svd(torch.cat([each.directions for each in maps]), full_matrices=False)
    directions = vh[values > _RELATIVE_ZERO]  # (q, d)
    penalty = max(each.penalty for each in maps)
    gram = penalty * torch.eye(len(directions), dtype=torch.float64)
    cross = torch.zeros(directions.shape[1], len(directions), dtype=torch.float64)  # (d, q)
    for each in maps:
        turned = each.directions @ directions.T  # (k, q)
        own = each.gram - each.penalty * torch.eye(len(each.gram), dtype=torch.float64)
        gram += turned.T @ own @ turned
        cross += each.outputs @ each.gram @ turned
    return EmbeddingMap(torch.linalg.solve(gram, cross.T).T, directions, gram, penalty)
