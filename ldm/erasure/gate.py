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

from ldm.erasure.negatives import Negatives
from ldm.erasure.prompt_rows import PromptRows

_OWN_WEIGHT = 0.02  # of the covariance of a concept's own rows, against that of all other rows
_LOOKALIKE_GAP = 0.2  # that lookalikes stay below a concept's prompts to count for its threshold
_TASKS_AT_ONCE = 32
_HARD_ROUNDS, _NUM_HARD, _HARD_WEIGHT = 3, 256, 0.1  # how often, and with what weight, the hardest rows count again


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


@dataclass(frozen=True)
class Positives:
    """The prompts that say a concept in one way: their rows, and where its last token is in each, (n,).

    With a `clearance` not all of them need to trip the gate, as misspelt names: the threshold then is that far above
    the highest other prompt, in units of the distance of the means.
    """

    rows: PromptRows
    last_tokens: torch.Tensor
    clearance: float | None = None


@dataclass(frozen=True)
class GateTask:
    """What a gate is fitted on: prompts that say a concept in one way, and which others count.

    `left_out` marks the negative prompts that say the concept, (N,). `lookalikes` are the rows of made-up words that
    are spelled much alike: they shape the direction, and raise the threshold as far as they stay clear of the concept.
    """

    positives: Positives
    left_out: torch.Tensor
    lookalikes: PromptRows


def fit_gates(tasks: Sequence[GateTask], negatives: Negatives, position: float) -> list[Gate | NoGateError]:
    """Return a gate of one direction for each task, or what tells that there is none.

    The threshold lies at the fraction `position` of the gap. What a task gets does not depend on the others, which are
    there since the rows of all negatives are read once for many of them.
    """
    found: list[Gate | NoGateError] = []
    for start in range(0, len(tasks), _TASKS_AT_ONCE):
        found += _fit_batch(tasks[start : start + _TASKS_AT_ONCE], negatives, position)
    return found


def fit_gate(task: GateTask, negatives: Negatives, position: float) -> Gate:
    """Return a gate of one direction. Raises NoGateError where there is no gap."""
    [found] = fit_gates([task], negatives, position)
    if isinstance(found, NoGateError):
        raise found
    return found


def _fit_batch(tasks: Sequence[GateTask], negatives: Negatives, position: float) -> list[Gate | NoGateError]:
    """Return what `fit_gates` does for a few tasks."""
    out = [negatives.rows_left_out(task.left_out) for task in tasks]
    fits = [_Discriminant(task.positives, negatives, rows) for task, rows in zip(tasks, out, strict=True)]
    for _ in range(_HARD_ROUNDS):
        weights = negatives.weights(torch.stack([fit.solve() for fit in fits]))
        scores = _scores(negatives, weights, out)
        for fit, task, weight, row in zip(fits, tasks, weights, scores, strict=True):
            hardest = row.topk(min(_NUM_HARD, int(row.isfinite().sum()))).indices
            alike = negatives.whiten(task.lookalikes.best(weight))
            fit.add(torch.cat([negatives.rows[hardest], alike]))
    weights = negatives.weights(torch.stack([fit.solve() for fit in fits])).half().float()  # as files have it
    scores = _scores(negatives, weights, out)
    found: list[Gate | NoGateError] = []
    for task, weight, row in zip(tasks, weights, scores, strict=True):
        found.append(_with_threshold(task, weight, row, negatives, position))
    return found


def _scores(negatives: Negatives, weights: torch.Tensor, left_out: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the scores (n, R) of all rows of negatives, minus infinity where they are left out.

    There are always as many columns in the product, since its rounding may depend on their number.
    """
    padded = torch.zeros(_TASKS_AT_ONCE, weights.shape[1])
    padded[: len(weights)] = weights
    return negatives.scores(padded)[: len(weights)].masked_fill(torch.stack(list(left_out)), -torch.inf)


def _with_threshold(
    task: GateTask, weight: torch.Tensor, scores: torch.Tensor, negatives: Negatives, position: float
) -> Gate | NoGateError:
    """Return the gate of a task whose weight (d,) scores the rows of its negatives so, (R,)."""
    own, highest = task.positives, scores.max()
    alike = task.lookalikes.highest(task.lookalikes.rows @ weight)
    if own.clearance is not None:
        return Gate(weight[None], (torch.cat([highest[None], alike]).max() + own.clearance)[None])
    lowest = own.rows.highest(own.rows.rows @ weight).min()
    gap = (lowest - highest).item()
    if gap <= 0:
        above = (scores >= lowest).nonzero()[:, 0]
        worst_first = above[scores[above].argsort(descending=True)]
        return NoGateError(gap, negatives.prompts_of(worst_first, task.left_out))
    below = alike[alike < lowest - _LOOKALIKE_GAP]
    bound = torch.cat([highest[None], below]).max()
    return Gate(weight[None], (bound + position * (lowest - bound))[None], gap)


class _Discriminant:
    """Fisher's discriminant of a concept's last tokens, in the coordinates of its negatives, as hard rows are added.

    There the covariance is `a I + U^T D U`: one, less the rows that are left out, and more for what counts more. So the
    direction is `o - U^T (a D^-1 + U U^T)^-1 U o`, but for its scale, where o is what the concept's mean is away from
    that of the others (Woodbury's identity).
    """

    def __init__(self, own: Positives, negatives: Negatives, left_out: torch.Tensor):
        rows = negatives.whiten(own.rows.at(own.last_tokens))  # (n, d)
        out = negatives.rows[left_out]
        kept = len(left_out) - len(out)
        self._mean = -out.sum(0) / kept
        self._offset = rows.mean(0) - self._mean
        self._scale = len(left_out) / kept
        spread = rows - rows.mean(0)
        self._rows = torch.cat([out, self._mean[None], spread])
        self._products = self._rows @ self._rows.T  # U U^T
        sizes = torch.tensor([len(out), 1, len(spread)])
        self._sizes = torch.tensor([-1 / kept, -1, _OWN_WEIGHT / len(spread)]).repeat_interleave(sizes)

    def add(self, hard: torch.Tensor) -> None:
        """Let rows (h, d) that are taken for the concept count more."""
        hard = hard - self._mean
        mixed = self._rows @ hard.T  # (k, h)
        corner = torch.cat([mixed, hard @ hard.T])
        self._products = torch.cat([torch.cat([self._products, mixed.T]), corner], dim=1)
        self._rows = torch.cat([self._rows, hard])
        self._scale *= 1 - _HARD_WEIGHT
        added = torch.full((len(hard),), _HARD_WEIGHT / len(hard))
        self._sizes = torch.cat([(1 - _HARD_WEIGHT) * self._sizes, added])

    def solve(self) -> torch.Tensor:
        """Return the direction (d,), whose score of the means' distance is 1."""
        inner = self._products + torch.diag(self._scale / self._sizes)
        direction = self._offset - self._rows.T @ torch.linalg.solve(inner, self._rows @ self._offset)
        return direction / (direction @ self._offset)


def join_gates(gates: Sequence[Gate]) -> Gate:
    """Return the gate that fires where any of `gates` does; its gap is the smallest of those that have one."""
    gaps = [gate.gap for gate in gates if gate.gap]
    weights, thresholds = torch.cat([gate.weights for gate in gates]), torch.cat([gate.thresholds for gate in gates])
    return Gate(weights, thresholds, min(gaps, default=0.0))
