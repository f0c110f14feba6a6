"""The one loop that every erasure runs on. It names no method; the caller logs and stops."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Step:
    """What one step saw, before its update: its number from 1, the whole loss and the watched term."""

    number: int
    loss: float
    watched: float


def erase(loss: Callable, parameters: list[torch.Tensor], batches: Iterable, lr: float) -> Iterator[Step]:
    """Minimise `loss(latents, step)` over `parameters` with Adam, one batch a step, for as long as it is iterated.

    Raises FloatingPointError when the loss or its gradient is NaN or infinite; `parameters` are then those before that
    step.
    """
    optimizer = torch.optim.Adam(parameters, lr=lr)
    for number, (latents, step) in enumerate(batches, start=1):
        optimizer.zero_grad()
        terms = loss(latents, step)
        terms.total.backward()
        norm = torch.nn.utils.get_total_norm([weight.grad for weight in parameters if weight.grad is not None])
        if not torch.isfinite(terms.total + norm):
            raise FloatingPointError(f"the loss is {terms.total.item()} and its gradient's norm {norm.item()} at step {number}, "
                                     "so nothing was saved: lower --lr or --scale_factor")
        optimizer.step()
        yield Step(number, terms.total.item(), terms.watched.item())


class MomentumStop:
    """Says when to stop: `m <- 0.9 m + 0.1 value` has fallen to `threshold`, though not before `least` steps."""

    def __init__(self, threshold: float, least: int = 10):
        self.threshold, self.least = threshold, least
        self.momentum: float | None = None

    def update(self, step: Step) -> bool:
        self.momentum = step.watched if self.momentum is None else 0.9 * self.momentum + 0.1 * step.watched
        return step.number >= self.least and self.momentum <= self.threshold
