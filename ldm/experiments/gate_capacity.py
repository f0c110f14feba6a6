"""How many gated concepts fit: how many gates together fire at most for a given fraction of everyday captions.

A further concept adds its own false alarms and takes nothing from the others. Of gates that fire for a caption with
probability p on average, n fire together for a fraction of at most n p.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch

from ldm.config.spellings import says
from ldm.diffusion.text_encoder import PromptEncoder
from ldm.erasure.gate_fitter import rate
from ldm.experiments.gates import FittedGates, decide, format_rate

DEFAULT_LIMITS = (0.01, 0.03)  # of the fraction of captions for which any gate fires though they say no concept
_QUANTILE = 1.96  # of the normal distribution, for an interval of 95 %


@dataclass(frozen=True)
class GateCapacity:
    """A row for each limit in `table`, and one for each gate in `gates`.

    Columns of `gates`: concept, gap, false_alarms, captions, low, high (Wilson's interval of 95 %). Those of `table`:
    the `limit`; how many `gates` there are, and concepts `without` one; the `smallest_gap`; what fraction of captions
    is `tripped`, for which any gate fires; how many `remaining_concepts` fit, none where no false alarm was seen; and
    how many fit `at_least`, by the upper end of an interval of 95 %.
    """

    table: pd.DataFrame
    gates: pd.DataFrame


def measure_gate_capacity(
    model: PromptEncoder, gates: FittedGates, captions: Sequence[str], limits: Sequence[float] = DEFAULT_LIMITS
) -> GateCapacity:
    """Return how many gates like those given fit, as far as their false alarms on captions tell."""
    fires = decide(model, gates, captions).margins > 0  # (N, C)
    said = torch.tensor([[says(caption, concept.spellings) for concept in gates.concepts] for caption in captions])
    is_alarm, counted = fires & ~said, (~said).sum(0)
    rows: list[dict[str, Any]] = []
    for number, (concept, edit) in enumerate(zip(gates.concepts, gates.edits, strict=True)):
        count, total, low, high = rate(int(is_alarm[:, number].sum()), int(counted[number]))
        gap = min(gate.gap for gate in edit.gates.values())
        row = {"concept": concept.name, "gap": round(gap, 4), "false_alarms": count, "captions": total}
        rows.append(row | {"low": low, "high": high})
    table = pd.DataFrame(rows)
    mean, highest = _mean_rate(is_alarm.sum(0) / counted, int(counted.sum()))
    shared = {
        "gates": len(gates.edits),
        "without": len(gates.refused),
        "smallest_gap": table["gap"].min(),
        "tripped": format_rate(rate(int(is_alarm.any(1).sum()), len(captions))),
    }
    limited: list[dict[str, Any]] = []
    for limit in limits:
        fitting = _remaining(limit, mean, len(gates.edits))
        least = _remaining(limit, highest, len(gates.edits))
        limited.append({"limit": limit, **shared, "remaining_concepts": fitting, "at_least": least})
    return GateCapacity(pd.DataFrame(limited).astype({"remaining_concepts": object}), table)


def _mean_rate(rates: torch.Tensor, decisions: int) -> tuple[float, float]:
    """Return the mean of the false alarm rates (C,) of gates, and the upper end of an interval of 95 % of it.

    That is the higher of two: Wilson's for all decisions alike, and that for gates of which some are worse than others.
    """
    mean = float(rates.double().mean())
    wilson = rate(round(mean * decisions), decisions)[3]
    spread = float(rates.double().std()) / math.sqrt(len(rates)) if len(rates) > 1 else 0.0
    return mean, max(wilson, mean + _QUANTILE * spread)


def _remaining(limit: float, alarm_rate: float, there: int) -> int | None:
    """Return how many gates more stay within a limit; None for a rate of 0, which sets none."""
    return max(0, int(limit / alarm_rate) - there) if alarm_rate else None
