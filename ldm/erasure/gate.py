"""Gates: whether a prompt says a concept.

A linear change of d-wide embeddings moves what nobody listed by about sqrt(concepts x directions / d) of what it does
to its concept. A gate keeps it from that: with e_t the rows of a prompt's embedding, or of an earlier hidden state,

    g = 1 if max_t w e_t > b else 0.

w is Fisher's linear discriminant between the row of the concept's last token and every row of prompts that do not say
it, found anew with more weight on those that come nearest (hard negatives); b lies in the gap between the highest of
these and the lowest prompt that says it. (Gates by similarity: SPM, arXiv 2312.16145.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

_OWN_WEIGHT = 0.02  # of the covariance of a concept's own rows, against that of all other rows
_LOOKALIKE_GAP = 0.2  # that lookalikes stay below a concept's prompts to count for its threshold
_HARD_ROUNDS, _NUM_HARD, _HARD_WEIGHT = 3, 2000, 0.1  # how often, and with what weight, the hardest rows count again


class NoGateError(ValueError):
    """Say that no threshold tells a concept's prompts from the `negatives`, by index, the worst first."""

    def __init__(self, gap: float, negatives: Sequence[int]):
        super().__init__(f"the highest row of other prompts is {-gap:.2f} above the lowest prompt of the concept")
        self.negatives = list(negatives)


@dataclass(frozen=True)
class Gate:
    """Directions `weights` (g, d) and `thresholds` (g,), float32, of which any that fires is enough.

    They are scaled so that scores are in units of the distance between the concept's mean row and the others' mean row.
    `gap` is that between the concept's lowest prompt and the highest of the others, the smallest of all directions.
    """

    weights: torch.Tensor
    thresholds: torch.Tensor
    gap: float = 0.0

    def margins(self, rows: torch.Tensor) -> torch.Tensor:
        """Return how far each prompt's rows (N, T, d) are above the threshold, (N,) float32: above 0 the gate fires."""
        return self.direction_margins(rows).amax(1)

    def direction_margins(self, rows: torch.Tensor) -> torch.Tensor:
        """Return how far each prompt's rows (N, T, d) are above the threshold of each direction, (N, g) float32."""
        scores = rows.float() @ self.weights.to(rows.device).T  # (N, T, g)
        return scores.amax(1) - self.thresholds.to(rows.device)


class Negatives:
    """The rows (N, T, d) of prompts that do not say a concept, and their sums, taken once for all concepts."""

    def __init__(self, rows: torch.Tensor):
        self.rows = rows
        self._moments = _moments(rows)

    def statistics(self, left_out: torch.Tensor, lookalikes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return mean (d,) and covariance (d, d), float64, of all rows but those of the prompts `left_out` (N,).

        The rows of `lookalikes` (L, T, d) count too.
        """
        count, first, second = self._moments
        for rows, sign in ((self.rows[left_out], -1), (lookalikes, 1)):
            own_count, own_first, own_second = _moments(rows)
            count, first, second = count + sign * own_count, first + sign * own_first, second + sign * own_second
        mean = first / count
        return mean, second / count - mean[:, None] * mean


def _moments(rows: torch.Tensor) -> tuple[int, torch.Tensor, torch.Tensor]:
    """Return the number of rows in (N, T, d), their sum (d,) and the sum of `e^T e` (d, d), in float64."""
    width = rows.shape[-1]
    first, second = torch.zeros(width, dtype=torch.float64), torch.zeros(width, width, dtype=torch.float64)
    for batch in rows.split(256):
        flat = batch.flatten(0, 1).double()
        first += flat.sum(0)
        second += flat.T @ flat
    return rows.shape[0] * rows.shape[1], first, second


@dataclass(frozen=True)
class Positives:
    """The prompts that say a concept in one way: their rows (n, T, d), and where its last token is in each, (n,).

    With a `clearance` not all of them need to trip the gate, as misspelt names: the threshold then is that far above
    the highest other prompt, in units of the distance of the means.
    """

    rows: torch.Tensor
    last_tokens: torch.Tensor
    clearance: float | None = None


def fit_gate(
    group: Positives,
    negatives: Negatives,
    left_out: torch.Tensor,
    lookalikes: torch.Tensor,
    ridge: float,
    position: float,
) -> Gate:
    """Return a gate of one direction for prompts that say a concept in one way.

    `left_out` marks the negative prompts that say the concept, (N,). `lookalikes` (L, T, d) are the rows of made-up
    words that are spelled much alike: they shape the direction, and raise the threshold as far as they stay clear of
    the concept. `ridge` is added to the covariance, relative to its mean diagonal; the threshold lies at the fraction
    `position` of the gap. Raises NoGateError where there is no gap.
    """
    others = [(negatives.rows, left_out), (lookalikes, None)]
    weight = _discriminant(group, others, *negatives.statistics(left_out, lookalikes), ridge)
    weight = weight.half().float()  # as files have it
    highest = _best_scores(negatives.rows, weight, left_out)[0]
    alike = _best_scores(lookalikes, weight)[0]
    if group.clearance is not None:
        return Gate(weight[None], (torch.cat([highest, alike]).max() + group.clearance)[None])
    lowest = (group.rows @ weight).amax(1).min()
    gap = (lowest - highest.max()).item()
    below = alike[alike < lowest - _LOOKALIKE_GAP]
    bound = torch.cat([highest, below]).max()
    if gap <= 0:
        above = (highest >= lowest).nonzero()[:, 0]
        raise NoGateError(gap, above[highest[above].argsort(descending=True)].tolist())
    return Gate(weight[None], (bound + position * (lowest - bound))[None], gap)


def join_gates(gates: Sequence[Gate]) -> Gate:
    """Return the gate that fires where any of `gates` does; its gap is the smallest of those that have one."""
    gaps = [gate.gap for gate in gates if gate.gap]
    weights, thresholds = torch.cat([gate.weights for gate in gates]), torch.cat([gate.thresholds for gate in gates])
    return Gate(weights, thresholds, min(gaps, default=0.0))


def _best_scores(
    rows: torch.Tensor, weight: torch.Tensor, left_out: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the highest score of each prompt's rows (N, T, d), minus infinity where left out, and that row: (N, d)."""
    best = (rows @ weight).max(1)
    scores = best.values if left_out is None else best.values.masked_fill(left_out, -torch.inf)
    return scores, rows[torch.arange(len(rows)), best.indices]


def _discriminant(
    group: Positives,
    others: Sequence[tuple[torch.Tensor, torch.Tensor | None]],
    mean: torch.Tensor,
    covariance: torch.Tensor,
    ridge: float,
) -> torch.Tensor:
    """Return Fisher's discriminant of a group's last tokens, (d,) float32, whose score of the means' distance is 1.

    It is found anew a few times, each time with more weight on the rows of `others`, rows (N, T, d) and which prompts
    are left out, that it takes for the concept.
    """
    own = group.rows[torch.arange(len(group.rows)), group.last_tokens].double()  # (n, d)
    offset, spread = own.mean(0) - mean, own - own.mean(0)
    fixed = ridge * covariance.diagonal().mean() * torch.eye(len(mean), dtype=covariance.dtype)
    fixed += _OWN_WEIGHT * spread.T @ spread / len(spread)
    weight = torch.zeros(len(mean))
    for iteration in range(_HARD_ROUNDS + 1):
        direction = torch.linalg.solve(covariance + fixed, offset)
        weight = (direction / (direction @ offset)).float()
        if iteration < _HARD_ROUNDS:
            found = [_best_scores(rows, weight, left_out) for rows, left_out in others]
            scores, rows = torch.cat([each[0] for each in found]), torch.cat([each[1] for each in found])
            hardest = scores.topk(min(_NUM_HARD, int(scores.isfinite().sum()))).indices
            hard = rows[hardest].double() - mean  # (h, d)
            covariance = (1 - _HARD_WEIGHT) * covariance + _HARD_WEIGHT * hard.T @ hard / len(hard)
    return weight
