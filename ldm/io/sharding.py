"""Which part of independent work is this process's own, when several do it together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

Item = TypeVar("Item")


@dataclass(frozen=True)
class Shard:
    """Of `size` processes the one with number `rank`, from 0."""

    rank: int = 0
    size: int = 1

    def select(self, items: Sequence[Item]) -> list[Item]:
        """Return every `size`-th of the items: all processes together have each of them once."""
        return list(items[self.rank :: self.size])
