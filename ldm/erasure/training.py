"""The one loop that every erasure trains in. It names no method; the caller logs and stops."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import pandas as pd
import torch
from tqdm import tqdm

from ldm.config.methods import TrainedConfig
from ldm.io.errors import notify

CURVE_COLUMNS = ["iteration", "loss", "monitor", "momentum"]  # of a learning curve


@dataclass(frozen=True)
class LossOutput:
    """`loss` is what is minimised; `monitor` is what decides when to stop."""

    loss: torch.Tensor
    monitor: torch.Tensor


class TrainableLoss(Protocol):
    """What training needs of a loss."""

    def parameters(self) -> list[torch.Tensor]:
        """Return what is trained."""
        ...

    def __call__(self, latents: Any, timestep: Any, /) -> LossOutput:
        """Return the loss of one batch."""
        ...


@dataclass(frozen=True)
class TrainStep:
    """What one iteration saw, before its update: its number from 1, the whole loss and the monitored term."""

    iteration: int
    loss: float
    monitor: float


def training_loop(loss: TrainableLoss, batches: Iterable[Any], lr: float) -> Iterator[TrainStep]:
    """Minimise `loss(latents, timestep)` over its parameters with Adam, one batch an iteration, while it is iterated.

    Raises FloatingPointError for a NaN or infinite loss or gradient; the parameters stay those before that iteration.
    """
    parameters = loss.parameters()
    optimizer = torch.optim.Adam(parameters, lr=lr)
    for iteration, (latents, timestep) in enumerate(batches, start=1):
        optimizer.zero_grad()
        output = loss(latents, timestep)
        output.loss.backward()
        norm = torch.nn.utils.get_total_norm([weight.grad for weight in parameters if weight.grad is not None])
        if not torch.isfinite(output.loss + norm):
            raise FloatingPointError(
                f"the loss is {output.loss.item()} and its gradient's norm {norm.item()} at iteration {iteration}, "
                "so nothing was saved: lower `lr`, or another setting that is large"
            )
        optimizer.step()
        yield TrainStep(iteration, output.loss.item(), output.monitor.item())


class MomentumStopping:
    """Say when to stop: `m <- 0.9 m + 0.1 monitor` has fallen to `threshold`, though not before `min_iterations`."""

    def __init__(self, threshold: float, min_iterations: int = 10):
        self.threshold, self.min_iterations = threshold, min_iterations
        self.momentum: float | None = None

    def update(self, step: TrainStep) -> bool:
        """Take an iteration in, and return whether to stop after it."""
        self.momentum = step.monitor if self.momentum is None else 0.9 * self.momentum + 0.1 * step.monitor
        return step.iteration >= self.min_iterations and self.momentum <= self.threshold


def fit(loss: TrainableLoss, batches: Iterable[Any], config: TrainedConfig, title: str) -> pd.DataFrame:
    """Run `training_loop` with progress until the config's `stop_threshold`, if it has one, or `max_steps` ends it.

    Returns one row per iteration, with the columns `CURVE_COLUMNS`.
    """
    threshold: float | None = getattr(config, "stop_threshold", None)
    stopping = MomentumStopping(float("-inf") if threshold is None else threshold)
    curve, reached = [], False
    with tqdm(total=config.max_steps, desc=title, unit="iteration") as bar:
        for step in itertools.islice(training_loop(loss, batches, config.lr), config.max_steps):
            reached = stopping.update(step)
            curve.append((step.iteration, step.loss, step.monitor, stopping.momentum))
            bar.set_postfix(momentum=f"{stopping.momentum:.2e}", refresh=False)
            bar.update()
            if reached:
                break
    if threshold is not None and not reached:
        notify(f"{title}: the threshold {threshold} was not reached within {config.max_steps} iterations")
    return pd.DataFrame(curve, columns=CURVE_COLUMNS)
