"""A scene played through time as an owner would: concepts erased and restored, no shift ever made twice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from PIL import Image

from ldm.config.concepts import EMPTY_PROMPT_LABEL, STATUSES, concept_status, erasable_concepts, get_concept
from ldm.config.methods import MethodConfig
from ldm.config.scenes import SceneStep
from ldm.experiments.experiment import Experiment
from ldm.io.image_grid import image_grid
from ldm.io.images import image_filename, open_image
from ldm.io.paths import ArtifactPaths
from ldm.io.prompts import read_prompt_csv
from ldm.ledger.ledger import Ledger, make_header
from ldm.ledger.operations import shift_record
from ldm.metrics.compare import GROUPS
from ldm.metrics.lpips import mean_psnr
from ldm.metrics.tables import format_cell

STATUS_PREFIXES = {"erased": "E ", "restored": "R ", "regular": ""}
STATUS_COLORS = {"erased": "crimson", "restored": "limegreen"}


def run_scene(
    experiment: Experiment,
    config: MethodConfig,
    scene: int,
    steps: Sequence[SceneStep],
    artifacts_dir: Path,
    protect_all: bool = False,
) -> tuple[pd.DataFrame, list[Path]]:
    """Run one method through a scene; return a row for each time and prompt, and the folder of images of each time.

    Columns: method, time, status, then those of `compare`. The prompts are those of `Experiment.evaluate`, and those of
    `Experiment.evaluate_unprotected`, whose status is their group; the folders have the former's images. Shifts are
    kept below `artifacts_dir`. Where the method can protect, it protects the concepts that the scene ever erases, or,
    with `protect_all`, all of the category. What is erased and restored when is a ledger,
    `sceneN-CATEGORY-METHOD.jsonl` beside the shifts.
    """
    method, category = config.name, experiment.category
    if protect_all:
        protected_indices = [concept.index for concept in erasable_concepts(category)]
    else:
        protected_indices = sorted(set().union(*(step.newly_erased for step in steps)))
    header = make_header(experiment.model, category, erasable_concepts(category), (), {})
    history = artifacts_dir / f"scene{scene}-{category}-{method}.jsonl"
    ledger = Ledger.create(history, header, "begin")  # no clock: the same files in every run
    tables, folders = [], []
    for step in steps:
        artifacts = ArtifactPaths(artifacts_dir, method, experiment.model.name, category, scene, step.time)
        concepts = [get_concept(category, index) for index in step.newly_erased]
        records, missing = ledger.plan_erasure(concepts, False)
        if missing:
            experiment.erase(artifacts, missing, protected_indices, config)
            for concept in missing:
                _, records[concept.label] = shift_record(ledger, artifacts, concept)
        to_restore = set(ledger.active_shifts()) - set(map(str, step.erased))
        ledger.append(records, to_restore, f"t{step.time}")
        shifts = ledger.shifts()
        name = f"{method}-{''.join(shifts)}"
        table, folder = experiment.evaluate(shifts, name)
        statuses = [concept_status(category, prompt, step.erased, step.restored) for prompt in table["prompt"]]
        table.insert(0, "status", statuses)
        unprotected = experiment.evaluate_unprotected(shifts, name, step.erased)
        if len(unprotected):
            table = pd.concat([table, unprotected], ignore_index=True)
        table.insert(0, "time", step.time)
        table.insert(0, "method", method)
        tables.append(table)
        folders.append(folder)
    return pd.concat(tables, ignore_index=True), folders


def summarize(table: pd.DataFrame, distance: str) -> pd.DataFrame:
    """Return the means over the erased, restored, regular and protected prompts of each method and time.

    These are the paper's Figures 8, 9, 13 and 14. Groups of prompts that nothing protects come after them. `distance`
    is the column of the Frechet distance.
    """
    groups = table.groupby(["method", "time", "status"], sort=False)
    aggregations = {
        "accuracy_before": ("accuracy_before", "mean"),
        "accuracy": ("accuracy_after", "mean"),
        "lpips": ("lpips", "mean"),
        "unchanged": ("unchanged", "mean"),
        "max_abs_diff": ("max_abs_diff", "max"),
        "psnr": ("psnr", mean_psnr),
        distance: (distance, "mean"),
    }
    means = groups.agg(**aggregations).reset_index()
    methods = list(table["method"].unique())
    statuses = list(dict.fromkeys([*GROUPS, *table["status"]]))

    def rank(column: pd.Series) -> pd.Series:
        if column.name == "status":
            return column.map(statuses.index)
        if column.name == "method":
            return column.map(methods.index)
        return column

    return means.sort_values(["method", "time", "status"], kind="stable", ignore_index=True, key=rank)


def wide_table(table: pd.DataFrame, category: str, distance: str) -> pd.DataFrame:
    """Return a row for each method and time with a cell for each prompt: the paper's Tables 2 and 3.

    A concept's cell is `distance / accuracy / LPIPS / unchanged`, marked E (erased) or R (restored); that of the
    watermarks and of the empty prompt is `PSNR / LPIPS / unchanged`. Other prompts that nothing protects have none.
    `distance` is the column of the Frechet distance.
    """
    table = table[table["status"].isin(STATUSES)]
    concept_prompts = {concept.prompt for concept in erasable_concepts(category)}
    rows = []
    for (method, time), group in table.groupby(["method", "time"], sort=False):
        row: dict[str, Any] = {"method": method, "time": time}
        for cell in group.to_dict("records"):
            prompt, lpips, unchanged = cell["prompt"], cell["lpips"], format_cell(cell["unchanged"])
            if prompt in concept_prompts:
                decimals = 0 if cell[distance] >= 100 else 2
                numbers = f"{cell[distance]:.{decimals}f} / {cell['accuracy_after']:.0f} / {lpips:.3f} / {unchanged}"
                row[prompt] = STATUS_PREFIXES[cell["status"]] + numbers
            else:
                row[prompt or EMPTY_PROMPT_LABEL] = f"{cell['psnr']:.1f} / {lpips:.1e} / {unchanged}"
        rows.append(row)
    return pd.DataFrame(rows)


def scene_grid(
    experiment: Experiment, steps: Sequence[SceneStep], folders: Mapping[str, Sequence[Path]]
) -> Image.Image:
    """Return a grid of every prompt's first image by the original and by each method at each time.

    `folders` has those of `run_scene` by method. An image has a red border where its concept is erased, a green one
    where it is restored.
    """
    original = experiment.generate({}, "")
    titles, columns = ["original"], [original]
    column_steps: list[SceneStep | None] = [None]
    for method, places in folders.items():
        for step, folder in zip(steps, places):
            titles.append(f"{method if step.time == 0 else ''}\nt{step.time}")
            columns.append(folder)
            column_steps.append(step)
    first_images: dict[str, str] = {}
    for case in read_prompt_csv(original / "prompts.csv"):
        first_images.setdefault(case.prompt, image_filename(case.case_number, 0))
    rows, border_colors = [], []
    for prompt, filename in first_images.items():
        rows.append((prompt or EMPTY_PROMPT_LABEL, [[open_image(folder / filename)] for folder in columns]))
        border_colors.append([_border_color(experiment.category, prompt, step) for step in column_steps])
    return image_grid(rows, titles, border_colors=border_colors)


def _border_color(category: str, prompt: str, step: SceneStep | None) -> str | None:
    """Return the color around a prompt's image at a time of a scene; None for none, and by the original."""
    if step is None:
        return None
    return STATUS_COLORS.get(concept_status(category, prompt, step.erased, step.restored))
