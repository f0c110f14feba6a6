"""TODO erasure.training."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
import itertools
import pandas as pd
import torch
from tqdm import tqdm


CURVE_COLUMNS = ["step", "loss", "watched", "momentum"]  # of a learning curve


@dataclass(frozen=True)
class TrainStep:
    """What one step saw, before its update: its number from 1, the whole loss and the watched term."""

    number: int
    loss: float
    watched: float


def training_loop(loss: Callable, parameters: list[torch.Tensor], batches: Iterable, lr: float) -> Iterator[TrainStep]:
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
        yield TrainStep(number, terms.total.item(), terms.monitor.item())


class MomentumStopping:
    """Says when to stop: `m <- 0.9 m + 0.1 value` has fallen to `threshold`, though not before `least` steps."""

    def __init__(self, threshold: float, least: int = 10):
        self.threshold, self.least = threshold, least
        self.momentum: float | None = None

    def update(self, step: TrainStep) -> bool:
        self.momentum = step.monitor if self.momentum is None else 0.9 * self.momentum + 0.1 * step.monitor
        return step.number >= self.least and self.momentum <= self.threshold


def fit(loss: Callable, batches: Iterable, lr: float, most: int, threshold: float | None, title: str) -> pd.DataFrame:
    """Run `erase` on the loss' own parameters, with progress, until `threshold` stops it or `most` steps are done.

    Returns one row per step: step, loss, watched, momentum.
    """
    stop, curve = MomentumStopping(float("-inf") if threshold is None else threshold), []
    with tqdm(total=most, desc=title, unit="step") as bar:
        for step in itertools.islice(training_loop(loss, loss.parameters(), batches, lr), most):
            reached = stop.update(step)
            curve.append((step.number, step.loss, step.monitor, stop.momentum))
            bar.set_postfix(momentum=f"{stop.momentum:.2e}", refresh=False)
            bar.update()
            if reached:
                break
    if threshold is not None and not reached:
        tqdm.write(f"{title}: --threshold {threshold} was not reached within --iter_break {most}")
    return pd.DataFrame(curve, columns=CURVE_COLUMNS)
