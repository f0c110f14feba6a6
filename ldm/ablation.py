"""SRS-ME erased and measured at several values of one choice, all else the same: a table and a plot for each ablation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from ldm.concepts import BLANK, get_concept, status
from ldm.experiment import Experiment
from ldm.images import atomic, write_text
from ldm.metrics.compare import to_markdown
from ldm.metrics.perceptual import mean_psnr
from ldm.plots import lines
from ldm.shift import WeightShift
from ldm.store import Store


@dataclass(frozen=True)
class Variant:
    """One value of the choice: the settings it erases with, and which concepts are protected."""

    value: float | str
    given: Mapping
    protected: Sequence[int]


def ablate(experiment: Experiment, root: Path, name: str, erased: Sequence[int], variants: Sequence[Variant]) -> pd.DataFrame:
    """A row for each variant and prompt: the columns of `compare` and value, status, steps, rank.

    `erased` are erased one by one and merged; their shifts are kept in ROOT/NAME-VALUE. Status is erased, protected (the
    watermarks, the blank prompt and a variant's protected concepts) or regular.
    """
    tables = []
    for variant in variants:
        store = Store(root / f"{name}-{variant.value}", "SRS-ME", experiment.model.name, experiment.category, 0, 0)
        experiment.learn(store, [get_concept(experiment.category, index) for index in erased], variant.protected, variant.given)
        shifts = {str(index): WeightShift.load(store.shift(index)) for index in erased}
        table, _ = experiment.measure(shifts, f"{name}-{variant.value}")
        table.insert(0, "status", [status(experiment.category, prompt, erased, protected=variant.protected)
                                   for prompt in table.prompt])
        table.insert(0, "value", variant.value)
        table["steps"] = sum(shift.recipe["steps"] for shift in shifts.values()) / len(shifts)
        table["rank"] = max(shift.recipe["rank"] for shift in shifts.values())
        tables.append(table)
    return pd.concat(tables, ignore_index=True)


def write(table: pd.DataFrame, by: str, x: str, distance: str, path: Path, log: bool = False) -> str:
    """Write PATH.csv (every row), PATH.md (means over `by`, status or prompt) and PATH.png (their plot over `x`, the
    name of the value). Returns the means as Markdown."""
    named = table.assign(prompt=table.prompt.replace("", BLANK))
    means = named.groupby(["value", by], sort=False).agg(
        accuracy_before=("accuracy_before", "mean"), accuracy=("accuracy_after", "mean"), lpips=("lpips", "mean"),
        psnr=("psnr", mean_psnr), largest_pixel=("largest_pixel", "max"), steps=("steps", "first"), rank=("rank", "first"),
        **{distance: (distance, "mean")}).reset_index().rename(columns={"value": x})
    text = to_markdown(means)
    with atomic(path.with_suffix(".csv")) as partial:
        table.to_csv(partial, index=False)
    write_text(path.with_suffix(".md"), text + "\n")
    measures = {"accuracy": "accuracy %", distance: distance, "lpips": "LPIPS"}
    lines(means, x, {column: label for column, label in measures.items() if means[column].notna().any()}, by,
          path.with_suffix(".png"), log=log)
    return text
