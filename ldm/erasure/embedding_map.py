"""Maps of embeddings: what a prompt that says a concept becomes, E -> E + E (A S)^T.

A S is the ridge regression of the rows of the concept's prompts onto those of their anchors. Maps of several concepts
overshoot when they are added up, since each one accounts for all of a prompt; so each keeps its normal equations, from
which `join_maps` solves the one map that is fitted on the rows of all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

_RELATIVE_ZERO = 1e-6
_OVERSAMPLING, _POWERS = 16, 1  # of directions, and of products with the moments


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

    def cut_to(self, loss: float, length: float, most: int) -> EmbeddingMap:
        """Return the map of the lowest rank, of `most` at most, that leaves at most `loss` more of the way than this.

        `length` is the mean square distance of the rows that it was fitted on from their anchors. Of its rank no map
        leaves less: it is `A gram^(1/2)` in its main directions, reduced-rank regression. It has its own normal
        equations; the directions that are left out are those of the outputs, not of the rows that it was fitted on.
        """
        gains, right = self._reduced()
        lost = gains.sum() - gains.cumsum(0)  # (k,), by what each rank takes less
        rank = 1 + int((lost > loss * length).sum()) if loss else len(lost)
        return self._cut(min(rank, most), right) if min(rank, most) < len(lost) else self

    def lengthened(self, whole: EmbeddingMap) -> EmbeddingMap:
        """Return this map, cut from a `whole` one, with longer outputs: on average rows go as far by it as by that."""
        gains = whole._reduced()[0]
        kept = gains[: len(self.directions)].sum()
        return replace(self, outputs=self.outputs * float(gains.sum() / kept)) if kept > 0 else self

    def _cut(self, rank: int, right: torch.Tensor) -> EmbeddingMap:
        kept = right[:rank] @ self.directions  # (r, d)
        directions = torch.linalg.qr(kept.T).Q.T
        turned = directions @ self.directions.T  # (r, k)
        gram = turned @ self.gram @ turned.T
        cross = self.outputs @ self.gram @ turned.T  # (d, r)
        return EmbeddingMap(torch.linalg.solve(gram, cross.T).T, directions, (gram + gram.T) / 2, self.penalty)

    def rounded(self) -> EmbeddingMap:
        """Return the map whose outputs and directions are numbers of half precision, as files have them."""
        outputs, directions = self.outputs.half().double(), self.directions.half().double()
        if not outputs.isfinite().all():  # too large for it
            return self
        return EmbeddingMap(outputs, directions, self.gram, self.penalty)

    def _reduced(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the squared singular values (k,) of `A gram^(1/2)`, and its right vectors times `gram^(-1/2)`.

        The former are what each direction takes off the mean square distance to the anchors, the largest first.
        """
        values, vectors = torch.linalg.eigh(self.gram)
        root = vectors * values.sqrt() @ vectors.T
        found = root @ self.outputs.T  # (k, d)
        squares, right = torch.linalg.eigh(found @ found.T)  # the largest last
        return squares.flip(0).clamp(min=0), right.flip(1).T @ (vectors / values.sqrt() @ vectors.T)


def fit_map(
    targets: torch.Tensor,
    anchors: torch.Tensor,
    ridge: float,
    rank: int,
    loss: float = 0.0,
    counts: torch.Tensor | None = None,
    most: int | None = None,
) -> EmbeddingMap:
    """Return the map of rows `targets` (n, d) to `anchors` (n, d), in the `rank` main directions of the targets.

    `ridge` is relative to the largest mean square of a projection. The map is cut to the lowest rank that leaves at
    most `loss` more of the way to the anchors, as a fraction of it, and to `most` directions, whatever that leaves; its
    outputs are then so much longer that on average the rows still go as far. `counts` (n,) says how often each row
    counts.
    """
    counts = torch.ones(len(targets)) if counts is None else counts
    roots = (counts / counts.sum()).sqrt().to(targets)[:, None]
    scaled, changes = roots * targets, (anchors - targets).mul_(roots)
    directions, largest = main_directions(scaled, rank)
    projections = scaled @ directions.to(scaled).T  # (n, k)
    cross = (changes.T @ projections).double()  # (d, k)
    penalty, precise = ridge * largest, projections.double()
    gram = precise.T @ precise + penalty * torch.eye(len(directions), dtype=torch.float64)
    found = EmbeddingMap(torch.linalg.solve(gram, cross.T).T, directions, gram, penalty)
    cut = found.cut_to(loss, float(changes.norm()) ** 2, rank)
    if most is None or most >= len(cut.directions):
        return cut
    return cut.cut_to(0, 1, most).lengthened(cut)


def main_directions(rows: torch.Tensor, rank: int) -> tuple[torch.Tensor, float]:
    """Return the `rank` main directions (k, d) of rows (n, d), float64, and the sum of squares along the first one.

    Of few out of many, a random start is multiplied by the rows' moments a few times (Halko et al., arXiv 0909.4061).
    """
    sketch = rank + _OVERSAMPLING
    if sketch >= min(rows.shape):
        values, vectors = torch.linalg.eigh(rows.double().T @ rows.double())
        return vectors[:, -min(rank, *rows.shape) :].T, float(values[-1])
    start = torch.randn(rows.shape[1], sketch, generator=torch.Generator().manual_seed(0))
    basis = torch.linalg.qr(start.to(rows)).Q
    for _ in range(_POWERS):
        basis = torch.linalg.qr(rows.T @ (rows @ basis)).Q  # (d, sketch)
    basis = torch.linalg.qr(basis.double()).Q
    projections = (rows @ basis.to(rows)).double()
    values, vectors = torch.linalg.eigh(projections.T @ projections)  # the largest last
    return (basis @ vectors[:, -rank:]).T, float(values[-1])


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


def mean_distance_left(before: torch.Tensor, after: torch.Tensor, aims: torch.Tensor) -> float:
    """Return how much of the way to their aims is left for prompts, on average: 0 for none, 1 for all of it.

    Of a prompt with embedding e that becomes e' and should become y, all (N, rows, d), it is `<y - e', y - e> / |y -
    e|^2`. Those that should not change do not count; where none should, it is 1.
    """
    way, remaining = (aims - before).flatten(1).double(), (aims - after).flatten(1).double()
    lengths = way.square().sum(1)
    left = (way * remaining).sum(1)[lengths > 0] / lengths[lengths > 0]
    return float(left.mean()) if len(left) else 1.0
