"""SRS-ME evaluated at several values of one choice, all else the same: a table and a plot for each ablation."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from ldm.config.concepts import EMPTY_PROMPT_LABEL, concept_status, get_concept
from ldm.config.methods import SRSMEConfig
from ldm.erasure.shift import WeightShift
from ldm.experiments.experiment import Experiment
from ldm.experiments.plots import LinePlot, plot_lines
from ldm.io.files import atomic_write, write_text
from ldm.io.images import image_filename
from ldm.io.paths import ArtifactPaths
from ldm.io.prompts import PromptCase, read_prompt_csv
from ldm.io.tensors import CREATED_BY
from ldm.metrics.frechet import extract_features, frechet_distance
from ldm.metrics.lpips import mean_psnr
from ldm.metrics.tables import to_markdown
from ldm.toy.render import render_to_folder

INITIALIZATIONS = {  # name -> changes of SRS-ME's settings
    "closed form": {"mode": "closed_form", "init": "closed_form"},
    "gradient": {"mode": "learn", "init": "zero"},
    "closed form, then gradient": {"mode": "learn", "init": "closed_form"},
}


@dataclass(frozen=True)
class Variant:
    """One value of the choice: the settings that it erases with, and the indexes of the concepts that are protected."""

    value: float | str
    config: SRSMEConfig
    protected: Sequence[int]


@dataclass(frozen=True)
class AblationSummary:
    """How an ablation is summarized: means over the groups of `by` (status or prompt), plotted over the values.

    `x` is what the values are called, `distance` the column of the Frechet distance; `log_x` makes x logarithmic.
    """

    by: str
    x: str
    distance: str
    log_x: bool = False


def _artifact_paths(experiment: Experiment, root: Path, name: str, value: float | str) -> ArtifactPaths:
    model_name = experiment.model.name
    return ArtifactPaths(root / f"{name}-{value}", SRSMEConfig.name, model_name, experiment.category, 0, 0)


def _load_shifts(artifacts: ArtifactPaths, erased: Sequence[int]) -> dict[str, WeightShift]:
    return {str(index): WeightShift.load(artifacts.shift(index)) for index in erased}


def _statuses(
    experiment: Experiment, table: pd.DataFrame, erased: Sequence[int], protected: Sequence[int]
) -> list[str]:
    prompts = table["prompt"]
    return [concept_status(experiment.category, prompt, erased, protected=protected) for prompt in prompts]


def run_ablation(
    experiment: Experiment, root: Path, name: str, erased: Sequence[int], variants: Sequence[Variant]
) -> pd.DataFrame:
    """Return a row for each variant and prompt: value, status, the columns of `compare`, iterations (mean), rank (max).

    The concepts `erased` are erased one by one and merged; their shifts are kept in ROOT/NAME-VALUE. Status is erased,
    protected (the watermarks, the empty prompt and a variant's protected concepts) or regular.
    """
    concepts = [get_concept(experiment.category, index) for index in erased]
    tables = []
    for variant in variants:
        artifacts = _artifact_paths(experiment, root, name, variant.value)
        experiment.erase(artifacts, concepts, variant.protected, variant.config)
        shifts = _load_shifts(artifacts, erased)
        table, _ = experiment.evaluate(shifts, f"{name}-{variant.value}")
        table.insert(0, "status", _statuses(experiment, table, erased, variant.protected))
        table.insert(0, "value", variant.value)
        table["iterations"] = sum(shift.metadata["iterations"] for shift in shifts.values()) / len(shifts)
        table["rank"] = max(shift.metadata["rank"] for shift in shifts.values())
        tables.append(table)
    return pd.concat(tables, ignore_index=True)


@dataclass(frozen=True)
class _Reference:
    """The features (N, F) of rendered images that show no concept of the category, to measure others against."""

    features: torch.Tensor
    device: torch.device
    inception_weights: Path | None

    @classmethod
    def render(cls, experiment: Experiment, num_images: int) -> _Reference:
        """Render `num_images` images and return their features."""
        folder = experiment.folder / "synthetic"
        cases = [PromptCase("", number, number) for number in range(num_images)]
        render_to_folder(None, experiment.category, cases, folder, {"created_by": CREATED_BY})
        device, inception_weights = experiment.model.device, experiment.inception_weights
        features = extract_features(sorted(folder.glob("*.png")), device, inception_weights)
        return cls(features, device, inception_weights)

    def distance(self, image_dir: Path, prompts: Collection[str]) -> float:
        """Return the Frechet distance of the images of `prompts` in a folder to the rendered ones."""
        cases = [case for case in read_prompt_csv(image_dir / "prompts.csv") if case.prompt in prompts]
        paths = [image_dir / image_filename(case.case_number, 0) for case in cases]
        return frechet_distance(extract_features(paths, self.device, self.inception_weights), self.features)


def compare_initializations(
    experiment: Experiment, root: Path, erased: Sequence[int], config: SRSMEConfig, num_rendered: int
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return `run_ablation` over `INITIALIZATIONS`, and the means of each; `experiment` has `held_out` set.

    Those that train do so for at most `config.max_steps` iterations. The means' column `fd_reference` is the Frechet
    distance of the erased prompts' images to `num_rendered` rendered ones that show no concept of the category. Two
    rows of the original model come first.
    """
    reference = _Reference.render(experiment, num_rendered)
    concepts = [get_concept(experiment.category, index) for index in erased]
    erased_prompts = {concept.prompt for concept in concepts}
    held_out_prompts: set[str] = set()
    for concept in concepts:
        held_out_prompts.update(concept.held_out_prompts)
    variants = []
    for name, changes in INITIALIZATIONS.items():
        variants.append(Variant(name.replace(",", "").replace(" ", "-"), config.with_changes(**changes), erased))
    table = run_ablation(experiment, root, "init", erased, variants)
    original = experiment.generate({}, "")
    rows: list[dict[str, Any]] = [
        {"initialization": "the original, empty prompt", "fd_reference": reference.distance(original, {""})},
        {"initialization": "the original, the concepts", "fd_reference": reference.distance(original, erased_prompts)},
    ]
    for variant, name in zip(variants, INITIALIZATIONS):
        shifts = _load_shifts(_artifact_paths(experiment, root, "init", variant.value), erased)
        edited = experiment.generate(shifts, f"init-{variant.value}")
        variant_rows = table[table["value"] == variant.value]
        regular = variant_rows[variant_rows["status"] == "regular"]
        protected = variant_rows[variant_rows["status"] == "protected"]
        rows.append(
            {
                "initialization": name,
                "iterations": variant_rows["iterations"].iloc[0],
                "erased": variant_rows[variant_rows["prompt"].isin(erased_prompts)]["accuracy_after"].mean(),
                "held-out": variant_rows[variant_rows["prompt"].isin(held_out_prompts)]["accuracy_after"].mean(),
                "regular before": regular["accuracy_before"].mean(),
                "regular": regular["accuracy_after"].mean(),
                "min regular": regular["accuracy_after"].min(),
                "regular LPIPS": regular["lpips"].mean(),
                "regular unchanged": regular["unchanged"].mean(),
                "protected LPIPS": protected["lpips"].mean(),
                "protected unchanged": protected["unchanged"].mean(),
                "fd_reference": reference.distance(edited, erased_prompts),
            }
        )
    return table, pd.DataFrame(rows)


def save_tables(table: pd.DataFrame, means: pd.DataFrame, path: Path) -> None:
    """Write PATH.csv (every row) and PATH.md (the means)."""
    with atomic_write(path.with_suffix(".csv")) as partial:
        table.to_csv(partial, index=False)
    write_text(path.with_suffix(".md"), to_markdown(means) + "\n")


def save_ablation(table: pd.DataFrame, path: Path, summary: AblationSummary) -> pd.DataFrame:
    """Write the table of `run_ablation` and its means by `save_tables`, and PATH.png, their plot.

    Return the means.
    """
    labelled = table.assign(prompt=table["prompt"].replace("", EMPTY_PROMPT_LABEL))
    aggregations = {
        "accuracy_before": ("accuracy_before", "mean"),
        "accuracy": ("accuracy_after", "mean"),
        "lpips": ("lpips", "mean"),
        "unchanged": ("unchanged", "mean"),
        "psnr": ("psnr", mean_psnr),
        "max_abs_diff": ("max_abs_diff", "max"),
        "iterations": ("iterations", "first"),
        "rank": ("rank", "first"),
        summary.distance: (summary.distance, "mean"),
    }
    means = labelled.groupby(["value", summary.by], sort=False).agg(**aggregations)
    means = means.reset_index().rename(columns={"value": summary.x})
    save_tables(table, means, path)
    labels = {"accuracy": "accuracy %", summary.distance: summary.distance, "lpips": "LPIPS"}
    metrics = {column: label for column, label in labels.items() if means[column].notna().any()}
    plot_lines(means, LinePlot(summary.x, summary.by, metrics, log_x=summary.log_x), path.with_suffix(".png"))
    return means
