"""Gates: whether a prompt says a concept.

A linear change of d-wide embeddings moves what nobody listed by about sqrt(concepts x directions / d) of what it does
to its concept. A gate keeps it from that: with e_t the rows of a prompt's embedding, or of an earlier hidden state,

    g = 1 if max_t w e_t > b else 0.

w is Fisher's linear discriminant between the row of the concept's last token and every row of prompts that do not say
it, found anew with more weight on those that come nearest (hard negatives); b lies in the gap between the highest of
these and the lowest prompt that says it. Where there is hardly a gap, as between namesakes, w is turned until it tells
the nearest rows apart, by logistic regression. (Gates by similarity: SPM, arXiv 2312.16145.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ldm.erasure.negatives import Negatives
from ldm.erasure.prompt_rows import PromptRows

_OWN_WEIGHT = 0.1  # of the covariance of a concept's own rows, against that of all other rows
_LOOKALIKE_GAP = 0.2  # that lookalikes stay below a concept's prompts to count for its threshold
_GROUPS_AT_ONCE = 32
_NUM_HARD, _HARD_WEIGHT = 600, 0.1  # rows, the hardest to a first direction, and with what weight they count again
_TURN_RIDGES, _TURN_STEPS = (0.01, 0.001), 60  # each ridge where the one before leaves too small a gap
_TURN_GAP = 0.05  # that a turned direction has to leave: a smaller one may be of these very prompts alone
_SHARPNESS = 20.0  # of the logistic loss: the inverse of its width, in units of the distance of the means
_NEAR_WEIGHT = 3.0  # of the negatives in it
_AS_CLEAR = 0.75  # of the margin that a gate has on its prompts, by which another stands for it
_NUM_NEAR = 4096  # rows, the nearest to a concept, from which a direction is turned


class NoGateError(ValueError):
    """Say that no threshold tells a concept's prompts from the `negatives`, by index, the worst first."""

    def __init__(self, gap: float, negatives: Sequence[int]):
        super().__init__(f"the highest row of other prompts is {-gap:.2f} above the lowest prompt of the concept")
        self.negatives = list(negatives)


@dataclass(frozen=True)
class Gate:
    """Directions `weights` (g, d) and `thresholds` (g,), float32, of which any that fires is enough.

    They are scaled so that scores are in units of the distance between the concept's mean row and the others' mean row,
    and are whole numbers of 8 bits times a power of two (`in_bytes`), but for those of older files.
    `gap` is that between the concept's lowest prompt and the highest of the others, the smallest of all directions.
    """

    weights: torch.Tensor
    thresholds: torch.Tensor
    gap: float = 0.0

    def margins(self, rows: torch.Tensor) -> torch.Tensor:
        """Return how far each prompt's rows (N, T, d) are above the threshold, (N,) float32: above 0 the gate fires."""
        return self.direction_margins(rows).amax(1)

    def row_margins(self, prompts: PromptRows) -> torch.Tensor:
        """Return what `margins` does of prompts that have different numbers of rows, on the CPU."""
        return prompts.highest((prompts.rows @ self.weights.T - self.thresholds).amax(1))

    def direction_margins(self, rows: torch.Tensor) -> torch.Tensor:
        """Return how far each prompt's rows (N, T, d) are above the threshold of each direction, (N, g) float32."""
        scores = rows.float() @ self.weights.to(rows.device).T  # (N, T, g)
        return scores.amax(1) - self.thresholds.to(rows.device)


def byte_scales(weights: torch.Tensor) -> torch.Tensor:
    """Return the power of two for each row of weights (g, d) by which its largest is from 64 to below 128, (g, 1)."""
    return torch.ldexp(torch.ones(len(weights), 1), torch.frexp(weights.abs().amax(1, keepdim=True) / 128).exponent)


def in_bytes(weights: torch.Tensor) -> torch.Tensor:
    """Return weights (g, d) as files have them: whole numbers from -127 to 127, times one of `byte_scales`.

    It changes gaps by at most 0.005, as thresholds are found after it (nineteen concepts on mini-sd-minilm).
    """
    scales = byte_scales(weights)
    return (weights / scales).round().clamp(-127, 127) * scales


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
    """What the gates of a concept are fitted on: groups of prompts that say it in one way each, and which others count.

    `left_out` marks the negative prompts that say the concept, (N,). `lookalikes` are the rows of made-up words that
    are spelled much alike: they shape the directions, and raise a threshold as far as they stay clear of the concept.
    """

    groups: Sequence[Positives]
    left_out: torch.Tensor
    lookalikes: PromptRows


def fit_gates(
    tasks: Sequence[GateTask], negatives: Negatives, position: float, turns: bool = True
) -> list[list[Gate | NoGateError]]:
    """Return for each task a gate of one direction for each of its groups, or what tells that there is none.

    The threshold lies at the fraction `position` of the gap. Without `turns` a direction that leaves hardly a gap is
    left so. What a task gets does not depend on the others, which are there since the rows of all negatives are read
    once for many of them.
    """
    found: list[list[Gate | NoGateError]] = []
    waiting: list[GateTask] = []
    for task in tasks:
        if waiting and sum(len(each.groups) for each in (*waiting, task)) > _GROUPS_AT_ONCE:
            found += _fit_batch(waiting, negatives, position, turns)
            waiting = []
        waiting.append(task)
    return found + (_fit_batch(waiting, negatives, position, turns) if waiting else [])


def _fit_batch(
    tasks: Sequence[GateTask], negatives: Negatives, position: float, turns: bool
) -> list[list[Gate | NoGateError]]:
    """Return what `fit_gates` does for a few tasks."""
    out = [negatives.rows_left_out(task.left_out) for task in tasks]
    fits = [_Discriminants(task.groups, negatives, rows) for task, rows in zip(tasks, out, strict=True)]
    weights = [negatives.weights(fit.solve()) for fit in fits]
    for fit, task, weight, scores in zip(fits, tasks, weights, _scores(negatives, weights, out), strict=True):
        hardest = _highest(scores.amax(0), _NUM_HARD)  # to any of the groups
        fit.add(torch.cat([negatives.rows[hardest], negatives.whiten(task.lookalikes.best(weight))]))
    weights = [in_bytes(negatives.weights(fit.solve())) for fit in fits]
    found: list[list[Gate | NoGateError]] = []
    for place, scores in enumerate(_scores(negatives, weights, out)):
        search = _Thresholds(tasks[place], negatives, out[place], position)
        gates: list[Gate | NoGateError] = []
        for number, group in enumerate(tasks[place].groups):
            gate = search.gate(group, weights[place][number], scores[number])
            is_near = isinstance(gate, NoGateError) or (group.clearance is None and gate.gap < _TURN_GAP)
            if turns and is_near:
                gate = search.turn(group, weights[place][number], scores[number], fits[place].offsets[number]) or gate
            gates.append(gate)
        found.append(gates)
    return found


def _highest(scores: torch.Tensor, num: int) -> torch.Tensor:
    """Return the numbers of the rows with the `num` highest scores, (R,), in order; none that is left out."""
    return scores.topk(min(num, int(scores.isfinite().sum()))).indices.sort().values


@torch.inference_mode(False)
def _turned(
    start: torch.Tensor,
    offset: torch.Tensor,
    group: Positives,
    negatives: Negatives,
    scores: torch.Tensor,
    ridge: float,
) -> torch.Tensor:
    """Return the weight (d,) of a direction `start` (d,) that is turned until it tells a group from its near negatives.

    These are the rows with the highest `scores`, (R,). It is their logistic regression, with a ridge on how far the
    direction is turned; `offset` (d,), which it scores as 1, is the distance of the means.
    """
    own = negatives.whiten(group.rows.at(group.last_tokens))  # (n, d)
    near = negatives.rows[_highest(scores, _NUM_NEAR)]
    direction = start.clone().requires_grad_()
    threshold = ((own @ start).min() + (near @ start).max()).div(2).requires_grad_()
    optimizer = torch.optim.LBFGS([direction, threshold], max_iter=_TURN_STEPS, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        missed = F.softplus(_SHARPNESS * (threshold - own @ direction)).mean()
        taken = F.softplus(_SHARPNESS * (near @ direction - threshold)).mean()
        turned = (direction - start).square().sum() / start.square().sum()
        total = missed + _NEAR_WEIGHT * taken + ridge * turned
        total.backward()
        return total

    optimizer.step(loss)
    found = direction.detach()
    return in_bytes(negatives.weights((found / (found @ offset))[None]))[0]


def _scores(
    negatives: Negatives, weights: Sequence[torch.Tensor], left_out: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    """Return for each task the scores (g, R) of all rows of negatives, minus infinity where they are left out.

    There are always as many columns in the product, since its rounding may depend on their number.
    """
    sizes = [len(each) for each in weights]
    padding = -sum(sizes) % _GROUPS_AT_ONCE
    scores = negatives.scores(torch.cat([*weights, torch.zeros(padding, weights[0].shape[1])]))
    parts = scores[: sum(sizes)].split(sizes)
    for part, out in zip(parts, left_out, strict=True):
        part[:, out] = -torch.inf
    return list(parts)


@dataclass(frozen=True)
class _Thresholds:
    """Where the threshold of a direction lies, for the groups of a task; `left_out` are rows of its negatives."""

    task: GateTask
    negatives: Negatives
    left_out: torch.Tensor
    position: float

    def gate(self, group: Positives, weight: torch.Tensor, scores: torch.Tensor) -> Gate | NoGateError:
        """Return the gate of a group whose weight (d,) scores the rows of the negatives so, (R,)."""
        alike, highest = self.task.lookalikes, scores.max()
        alike = alike.highest(alike.rows @ weight)
        if group.clearance is not None:
            return Gate(weight[None], (torch.cat([highest[None], alike]).max() + group.clearance)[None])
        lowest = group.rows.highest(group.rows.rows @ weight).min()
        gap = (lowest - highest).item()
        if gap <= 0:
            above = (scores >= lowest).nonzero()[:, 0]
            worst_first = above[scores[above].argsort(descending=True)]
            return NoGateError(gap, self.negatives.prompts_of(worst_first, self.task.left_out))
        below = alike[alike < lowest - _LOOKALIKE_GAP]
        bound = torch.cat([highest[None], below]).max()
        return Gate(weight[None], (bound + self.position * (lowest - bound))[None], gap)

    def turn(self, group: Positives, weight: torch.Tensor, scores: torch.Tensor, offset: torch.Tensor) -> Gate | None:
        """Return the gate of a group whose weight leaves hardly a gap, turned until it leaves one; None for none."""
        start = self.negatives.directions(weight[None])[0]
        for ridge in _TURN_RIDGES:
            turned = _turned(start, offset, group, self.negatives, scores, ridge)
            [[scores]] = _scores(self.negatives, [turned[None]], [self.left_out])
            gate = self.gate(group, turned, scores)
            if isinstance(gate, Gate) and gate.gap >= _TURN_GAP:
                return gate
        return None


class _Discriminants:
    """Fisher's discriminants of the groups of a concept, in the coordinates of its negatives, as hard rows are added.

    There the covariance is one, less the rows that are left out, and more for those that count more.
    """

    def __init__(self, groups: Sequence[Positives], negatives: Negatives, left_out: torch.Tensor):
        out, total = negatives.rows[left_out], len(negatives.rows)
        kept = total - len(out)
        self._mean = -out.sum(0) / kept
        self._covariance = total / kept * torch.eye(len(self._mean)) - out.T @ out / kept
        self._covariance -= self._mean[:, None] * self._mean
        self.offsets: list[torch.Tensor] = []
        self._spreads: list[torch.Tensor] = []  # rows (n, d) whose products the covariance is more by, for each group
        for group in groups:
            rows = negatives.whiten(group.rows.at(group.last_tokens))  # (n, d)
            spread = rows - rows.mean(0)
            self.offsets.append(rows.mean(0) - self._mean)
            self._spreads.append((_OWN_WEIGHT / len(spread)) ** 0.5 * spread)

    def add(self, hard: torch.Tensor) -> None:
        """Let rows (h, d) that are taken for the concept count more."""
        hard = hard - self._mean
        weight = _HARD_WEIGHT / len(hard)
        self._covariance = torch.addmm(self._covariance, hard.T, hard, beta=1 - _HARD_WEIGHT, alpha=weight)

    def solve(self) -> torch.Tensor:
        """Return the direction of each group, (g, d), whose score of the means' distance is 1."""
        factor = torch.linalg.cholesky(self._covariance)  # once for all groups, whose few rows are an update of it
        directions: list[torch.Tensor] = []
        for offset, spread in zip(self.offsets, self._spreads, strict=True):
            sides = torch.linalg.solve_triangular(factor, torch.cat([offset[None], spread]).T, upper=False)
            start, own = sides[:, :1], sides[:, 1:]  # (d, 1) and (d, n)
            inner = torch.eye(len(spread)) + own.T @ own
            start = start - own @ torch.linalg.solve(inner, own.T @ start)  # Woodbury's identity
            direction = torch.linalg.solve_triangular(factor.T, start, upper=True)[:, 0]
            directions.append(direction / (direction @ offset))
        return torch.stack(directions)


def without_needless(gates: Sequence[Gate], groups: Sequence[Positives]) -> list[Gate]:
    """Return the gates of groups of prompts, one of each, but for those whose prompts another that stays tells too.

    That is where it has all of them three quarters as far above its threshold as their own gate, or further.
    """
    lowest = [[gate.row_margins(group.rows).min().item() for group in groups] for gate in gates]
    kept = list(range(len(gates)))
    for number in range(len(gates)):
        rest = [other for other in kept if other != number]
        left_out = [group for group in range(len(groups)) if group not in rest]
        if all(any(lowest[other][group] >= _AS_CLEAR * lowest[group][group] for other in rest) for group in left_out):
            kept = rest
    return [gates[number] for number in kept]


def join_gates(gates: Sequence[Gate]) -> Gate:
    """Return the gate that fires where any of `gates` does; its gap is the smallest of those that have one."""
    gaps = [gate.gap for gate in gates if gate.gap]
    weights, thresholds = torch.cat([gate.weights for gate in gates]), torch.cat([gate.thresholds for gate in gates])
    return Gate(weights, thresholds, min(gaps, default=0.0))
