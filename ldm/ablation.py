"""SRS-ME erased and measured at several values of one choice, all else the same: a table and a plot for each ablation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from ldm.concepts import BLANK, get_concept, status
from ldm.experiment import Experiment
from ldm.images import Case, atomic, image_name, read_cases, write_text
from ldm.metrics.compare import to_markdown
from ldm.metrics.frechet import features, frechet
from ldm.metrics.perceptual import mean_psnr
from ldm.mini.paint import paint_folder
from ldm.plots import lines
from ldm.shift import WeightShift
from ldm.store import Store


STARTS = {"closed form": ("closed-form", False), "gradient": ("zero", True), "closed form, then gradient": ("closed-form", True)}


@dataclass(frozen=True)
class Variant:
    """One value of the choice: the settings it erases with, and which concepts are protected."""

    value: float | str
    given: Mapping
    protected: Sequence[int]


def _store(experiment: Experiment, root: Path, name: str, value: float | str) -> Store:
    return Store(root / f"{name}-{value}", "SRS-ME", experiment.model.name, experiment.category, 0, 0)


def _shifts(store: Store, erased: Sequence[int]) -> dict[str, WeightShift]:
    return {str(index): WeightShift.load(store.shift(index)) for index in erased}


def ablate(experiment: Experiment, root: Path, name: str, erased: Sequence[int], variants: Sequence[Variant]) -> pd.DataFrame:
    """A row for each variant and prompt: the columns of `compare` and value, status, steps, rank.

    `erased` are erased one by one and merged; their shifts are kept in ROOT/NAME-VALUE. Status is erased, protected (the
    watermarks, the blank prompt and a variant's protected concepts) or regular.
    """
    tables = []
    for variant in variants:
        store = _store(experiment, root, name, variant.value)
        experiment.learn(store, [get_concept(experiment.category, index) for index in erased], variant.protected, variant.given)
        shifts = _shifts(store, erased)
        table, _ = experiment.measure(shifts, f"{name}-{variant.value}")
        table.insert(0, "status", [status(experiment.category, prompt, erased, protected=variant.protected)
                                   for prompt in table.prompt])
        table.insert(0, "value", variant.value)
        table["steps"] = sum(shift.recipe["steps"] for shift in shifts.values()) / len(shifts)
        table["rank"] = max(shift.recipe["rank"] for shift in shifts.values())
        tables.append(table)
    return pd.concat(tables, ignore_index=True)


def compare_starts(experiment: Experiment, root: Path, erased: Sequence[int], given: Mapping, steps: int,
                   num_painted: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """`ablate` over `STARTS`, with at most `steps` where these learn, and the means of each start; `experiment` draws held-out
    templates too.

    The means' column `world` is the Frechet distance of the erased prompts' pictures to `num_painted` painted ones that show
    no concept of the category. Two rows of the original model come first.
    """
    device, inception = experiment.model.device, experiment.inception
    painted = experiment.folder / "painted"
    paint_folder(None, experiment.category, [Case("", k, k) for k in range(num_painted)], painted, {"made_by": "ablate-init.py"})
    world = features(sorted(painted.glob("*.png")), device, inception)
    concepts = [get_concept(experiment.category, index) for index in erased]
    names = {concept.prompt for concept in concepts}
    held_out = {template.format(concept.prompt) for concept in concepts for template in concept.held_out}

    def far(folder: Path, prompts: set[str]) -> float:
        cases = [case for case in read_cases(folder / "prompts.csv") if case.prompt in prompts]
        return frechet(features([folder / image_name(case.number, 0) for case in cases], device, inception), world)

    variants = [Variant(name.replace(",", "").replace(" ", "-"), {**given, "init": init, "iter_break": steps * learns}, erased)
                for name, (init, learns) in STARTS.items()]
    table = ablate(experiment, root, "init", erased, variants)
    original = experiment.images({}, "")
    rows = [{"start": "the original, blank prompt", "world": far(original, {""})},
            {"start": "the original, the concepts", "world": far(original, names)}]
    for variant, name in zip(variants, STARTS):
        shifts = _shifts(_store(experiment, root, "init", variant.value), erased)
        part = table[table.value == variant.value]
        regular = part[part.status == "regular"]
        rows.append({"start": name, "steps": part.steps.iloc[0], "erased": part[part.prompt.isin(names)].accuracy_after.mean(),
                     "held-out": part[part.prompt.isin(held_out)].accuracy_after.mean(),
                     "regular before": regular.accuracy_before.mean(), "regular": regular.accuracy_after.mean(),
                     "least regular": regular.accuracy_after.min(), "regular LPIPS": regular.lpips.mean(),
                     "protected LPIPS": part[part.status == "protected"].lpips.mean(),
                     "world": far(experiment.images(shifts, f"init-{variant.value}"), names)})
    return table, pd.DataFrame(rows)


def save(table: pd.DataFrame, means: pd.DataFrame, path: Path) -> str:
    """Write PATH.csv (every row) and PATH.md (the means). Returns the means as Markdown."""
    text = to_markdown(means)
    with atomic(path.with_suffix(".csv")) as partial:
        table.to_csv(partial, index=False)
    write_text(path.with_suffix(".md"), text + "\n")
    return text


def write(table: pd.DataFrame, by: str, x: str, distance: str, path: Path, log: bool = False) -> str:
    """`save` a table with its means over `by` (status or prompt), and write PATH.png (their plot over `x`, the
    name of the value). Returns the means as Markdown."""
    named = table.assign(prompt=table.prompt.replace("", BLANK))
    means = named.groupby(["value", by], sort=False).agg(
        accuracy_before=("accuracy_before", "mean"), accuracy=("accuracy_after", "mean"), lpips=("lpips", "mean"),
        psnr=("psnr", mean_psnr), largest_pixel=("largest_pixel", "max"), steps=("steps", "first"), rank=("rank", "first"),
        **{distance: (distance, "mean")}).reset_index().rename(columns={"value": x})
    text = save(table, means, path)
    measures = {"accuracy": "accuracy %", distance: distance, "lpips": "LPIPS"}
    lines(means, x, {column: label for column, label in measures.items() if means[column].notna().any()}, by,
          path.with_suffix(".png"), log=log)
    return text
