"""The rows of prompts' hidden states by which gates are fitted: those of their tokens, and a few of their padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch

_NUM_PADDING = 3  # rows of padding that are kept of a prompt


def kept_positions(length: int, total: int, number: int) -> list[int]:
    """Return which of `total` rows are kept of a prompt of `length` tokens: all of these, and three of its padding.

    Those are the first, the last and one between, which a `number` of the prompt's chooses: within a prompt they are
    nearly the same, and all prompts together have a row of each position.
    """
    if total - length <= _NUM_PADDING:
        return list(range(total))
    between = total - length - 2
    return [*range(length + 1), length + 1 + number % between, total - 1]


def row_counts(positions: Sequence[int], total: int) -> torch.Tensor:
    """Return how often each row counts that is kept of a prompt's `total`, (t,): those of padding for all of it."""
    padding = min(_NUM_PADDING, len(positions))
    counts = torch.ones(len(positions))
    counts[len(positions) - padding :] += (total - len(positions)) / padding
    return counts


@dataclass(frozen=True)
class PromptRows:
    """The rows (R, d), float32, of N prompts, one prompt after the other, and how many each has, (N,)."""

    rows: torch.Tensor
    counts: torch.Tensor

    def __len__(self) -> int:
        return len(self.counts)

    @classmethod
    def join(cls, prompts: Sequence[torch.Tensor], width: int) -> Self:
        """Return the rows of prompts, each of which has its own, (t, `width`)."""
        counts = torch.tensor([len(rows) for rows in prompts], dtype=torch.long)
        return cls(torch.cat([torch.zeros(0, width), *prompts]), counts)

    @classmethod
    def whole(cls, states: torch.Tensor) -> Self:
        """Return all rows of hidden states (N, T, d)."""
        return cls(states.flatten(0, 1).float(), torch.full((len(states),), states.shape[1]))

    @property
    def owners(self) -> torch.Tensor:
        """Return the number of the prompt that each row is of, (R,)."""
        return torch.arange(len(self)).repeat_interleave(self.counts)

    def at(self, positions: torch.Tensor) -> torch.Tensor:
        """Return a row of each prompt, (N, d): that at its position, (N,)."""
        return self.rows[self.counts.cumsum(0) - self.counts + positions]

    def select(self, prompts: Sequence[int]) -> PromptRows:
        """Return the rows of some of the prompts."""
        parts = self.rows.split(self.counts.tolist())
        return PromptRows.join([parts[number] for number in prompts], self.rows.shape[1])

    def highest(self, scores: torch.Tensor) -> torch.Tensor:
        """Return the highest score of each prompt, (N,), of those of its rows, (R,)."""
        lowest = torch.full((len(self),), -torch.inf)
        return lowest.scatter_reduce(0, self.owners, scores, "amax")

    def best(self, weights: torch.Tensor) -> torch.Tensor:
        """Return the row of each prompt that any of some weights (g, d) scores highest, (N, d)."""
        scores, owners = (self.rows @ weights.T).amax(1), self.owners
        found = (scores == self.highest(scores)[owners]).nonzero().flatten()
        first = torch.full((len(self),), len(scores)).scatter_reduce(0, owners[found], found, "amin")
        return self.rows[first]
