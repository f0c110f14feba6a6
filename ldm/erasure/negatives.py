"""The rows of prompts that trip no gate, in coordinates in which their covariance is one: taken once for all concepts.

With mean m and covariance C = L L^T, its ridge included, a row e is z = L^-1 (e - m). A direction v of such rows is the
weight w = L^-T v of the rows as they are, since v z = w (e - m).
"""

from __future__ import annotations

import hashlib

import torch

from ldm.erasure.prompt_rows import PromptRows

_ROWS_AT_ONCE = 8192
_ROWS_SCORED = 4096  # at once, a fifth faster than all of them, as a cache holds them


class Negatives:
    """Rows of prompts that trip no gate. Rows that are the same in several prompts, as their beginnings, count once.

    `ridge` is added to the covariance, relative to its mean diagonal.
    """

    def __init__(self, prompts: PromptRows, ridge: float):
        distinct, self._places = _distinct(prompts.rows)
        self._owners, self._counts, self._ends = prompts.owners, prompts.counts, prompts.counts.cumsum(0)
        self._uses = self._places.bincount(minlength=len(distinct))  # how many rows of prompts each row is
        self._mean, covariance = _moments(prompts.rows, distinct)
        eye = torch.eye(len(covariance), dtype=torch.float64)
        self._factor = torch.linalg.cholesky(covariance + ridge * covariance.diagonal().mean() * eye)
        self._inverse = torch.linalg.solve_triangular(self._factor, eye, upper=False).float()  # L^-1
        self.rows = torch.empty(len(distinct), len(eye))  # (R, d), float32, filled in parts so that no copy is held
        for part, numbers in zip(self.rows.split(_ROWS_AT_ONCE), distinct.split(_ROWS_AT_ONCE), strict=True):
            part.copy_(self.whiten(prompts.rows[numbers]))

    def whiten(self, rows: torch.Tensor) -> torch.Tensor:
        """Return rows (n, d) in coordinates in which the covariance of the negatives is one, float32."""
        return (rows.double() - self._mean).float() @ self._inverse.T

    def weights(self, directions: torch.Tensor) -> torch.Tensor:
        """Return the weights (n, d) that score rows as directions (n, d) score whitened ones, but for a constant."""
        return directions @ self._inverse

    def directions(self, weights: torch.Tensor) -> torch.Tensor:
        """Return the directions (n, d) that score whitened rows as weights (n, d) score rows, but for a constant."""
        return (weights.double() @ self._factor).float()

    def scores(self, weights: torch.Tensor) -> torch.Tensor:
        """Return what weights (n, d) make of all rows as they were, (n, R)."""
        constants = (weights.double() @ self._mean).float()[:, None]
        directions = self.directions(weights)
        scores = torch.empty(len(weights), len(self.rows))
        for part, rows in zip(scores.split(_ROWS_SCORED, 1), self.rows.split(_ROWS_SCORED), strict=True):
            part.copy_(torch.addmm(constants, directions, rows.T))
        return scores

    def rows_left_out(self, left_out: torch.Tensor) -> torch.Tensor:
        """Return the numbers of the rows that are of no prompt but those `left_out`, (N,), in order."""
        numbers = left_out.nonzero()[:, 0]
        bounds = zip((self._ends - self._counts)[numbers].tolist(), self._ends[numbers].tolist(), strict=True)
        own = [self._places[start:end] for start, end in bounds]
        rows, uses = torch.cat([self._places[:0], *own]).unique(return_counts=True)
        return rows[uses == self._uses[rows]]

    def prompts_of(self, rows: torch.Tensor, left_out: torch.Tensor) -> list[int]:
        """Return the prompts that have some of the rows, given by number and in their order, but for those left out."""
        found: dict[int, None] = {}
        for row in rows.tolist():
            owners = self._owners[self._places == row]
            found |= dict.fromkeys(owners[~left_out[owners]].tolist())
        return list(found)


def _distinct(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the numbers of the rows that are the same as no earlier one, and which of these each row is, (R,)."""
    known: dict[bytes, int] = {}  # by digest, so that no copy of the rows is held
    first: list[int] = []
    places: list[int] = []
    for number, row in enumerate(rows.numpy()):
        place = known.setdefault(hashlib.blake2b(row.tobytes(), digest_size=16).digest(), len(first))
        if place == len(first):
            first.append(number)
        places.append(place)
    return torch.tensor(first, dtype=torch.long), torch.tensor(places, dtype=torch.long)


def _moments(rows: torch.Tensor, numbers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the mean (d,) and the covariance (d, d) of the rows with these numbers, in float64."""
    width = rows.shape[1]
    start = rows[numbers[:_ROWS_AT_ONCE]].mean(0)  # near the mean, so that little is lost in products of float32
    first, second = torch.zeros(width, dtype=torch.float64), torch.zeros(width, width, dtype=torch.float64)
    for part in numbers.split(_ROWS_AT_ONCE):
        centred = rows[part] - start
        first += centred.sum(0, dtype=torch.float64)
        second += centred.T @ centred
    mean = first / len(numbers)
    return start + mean, second / len(numbers) - mean[:, None] * mean
