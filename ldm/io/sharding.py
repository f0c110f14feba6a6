"""Which shard of independent work is this process's own, of several processes and of a SLURM job array's tasks."""

from __future__ import annotations

import os
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


def job_shard(rank: int, size: int) -> Shard:
    """Return the shard of process `rank` of the `size` that were started together, in its task of a SLURM job array.

    Without a job array it is the process's alone. Raises ValueError for an array of tasks not numbered one by one.
    """
    tasks = int(os.environ.get("SLURM_ARRAY_TASK_COUNT", "1"))
    task = int(os.environ.get("SLURM_ARRAY_TASK_ID", "0")) - int(os.environ.get("SLURM_ARRAY_TASK_MIN", "0"))
    if not 0 <= task < tasks:
        raise ValueError("the tasks of the job array are not numbered one by one: submit it with such as 0-3")
    return Shard(task * size + rank, tasks * size)
