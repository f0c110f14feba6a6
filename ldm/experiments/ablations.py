"""TODO experiments.ablations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
import pandas as pd
from pathlib import Path
from ldm.config.concepts import EMPTY_PROMPT_LABEL, concept_status, get_concept
from ldm.erasure.shift import WeightShift
from ldm.experiments.experiment import Experiment
from ldm.experiments.plots import plot_lines
from ldm.io.files import atomic_write, write_text
from ldm.io.images import image_filename
from ldm.io.paths import ArtifactPaths
from ldm.io.prompts import PromptCase, read_prompt_csv
from ldm.metrics.frechet import extract_features, frechet_distance
from ldm.metrics.lpips import mean_psnr
from ldm.metrics.tables import to_markdown
from ldm.toy.render import render_to_folder


INITIALIZATIONS = {"closed form": ("closed-form", False), "gradient": ("zero", True), "closed form, then gradient": ("closed-form", True)}


@dataclass(frozen=True)
class Variant:
    """One value of the choice: the settings it erases with, and which concepts are protected."""

    value: float | str
    given: Mapping
    protected: Sequence[int]


def _artifact_paths(experiment: Experiment, root: Path, name: str, value: float | str) -> ArtifactPaths:
    return ArtifactPaths(root / f"{name}-{value}", "SRS-ME", experiment.model.name, experiment.category, 0, 0)


def _load_shifts(store: ArtifactPaths, erased: Sequence[int]) -> dict[str, WeightShift]:
    return {str(index): WeightShift.load(store.shift(index)) for index in erased}


def run_ablation(experiment: Experiment, root: Path, name: str, erased: Sequence[int], variants: Sequence[Variant]) -> pd.DataFrame:
    """A row for each variant and prompt: the columns of `compare` and value, status, steps, rank.

    `erased` are erased one by one and merged; their shifts are kept in ROOT/NAME-VALUE. Status is erased, protected (the
    watermarks, the blank prompt and a variant's protected concepts) or regular.
    """
    tables = []
    for variant in variants:
        store = _artifact_paths(experiment, root, name, variant.value)
        experiment.learn(store, [get_concept(experiment.category, index) for index in erased], variant.protected, variant.given)
        shifts = _load_shifts(store, erased)
        table, _ = experiment.measure(shifts, f"{name}-{variant.value}")
        table.insert(0, "status", [concept_status(experiment.category, prompt, erased, protected=variant.protected)
                                   for prompt in table.prompt])
        table.insert(0, "value", variant.value)
        table["steps"] = sum(shift.metadata["steps"] for shift in shifts.values()) / len(shifts)
        table["rank"] = max(shift.metadata["rank"] for shift in shifts.values())
        tables.append(table)
    return pd.concat(tables, ignore_index=True)


def compare_initializations(experiment: Experiment, root: Path, erased: Sequence[int], given: Mapping, steps: int,
                   num_painted: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """`ablate` over `STARTS`, with at most `steps` where these learn, and the means of each start; `experiment` draws held-out
    templates too.

    The means' column `world` is the Frechet distance of the erased prompts' pictures to `num_painted` painted ones that show
    no concept of the category. Two rows of the original model come first.
    """
    device, inception = experiment.model.device, experiment.inception
    painted = experiment.folder / "painted"
    render_to_folder(None, experiment.category, [PromptCase("", k, k) for k in range(num_painted)], painted, {"made_by": "ablate-init.py"})
    world = extract_features(sorted(painted.glob("*.png")), device, inception)
    concepts = [get_concept(experiment.category, index) for index in erased]
    names = {concept.prompt for concept in concepts}
    held_out = {template.format(concept.prompt) for concept in concepts for template in concept.held_out}

    def far(folder: Path, prompts: set[str]) -> float:
        cases = [case for case in read_prompt_csv(folder / "prompts.csv") if case.prompt in prompts]
        return frechet_distance(extract_features([folder / image_filename(case.number, 0) for case in cases], device, inception), world)

    variants = [Variant(name.replace(",", "").replace(" ", "-"), {**given, "init": init, "iter_break": steps * learns}, erased)
                for name, (init, learns) in INITIALIZATIONS.items()]
    table = run_ablation(experiment, root, "init", erased, variants)
    original = experiment.images({}, "")
    rows = [{"start": "the original, blank prompt", "world": far(original, {""})},
            {"start": "the original, the concepts", "world": far(original, names)}]
    for variant, name in zip(variants, INITIALIZATIONS):
        shifts = _load_shifts(_artifact_paths(experiment, root, "init", variant.value), erased)
        part = table[table.value == variant.value]
        regular = part[part.status == "regular"]
        rows.append({"start": name, "steps": part.steps.iloc[0], "erased": part[part.prompt.isin(names)].accuracy_after.mean(),
                     "held-out": part[part.prompt.isin(held_out)].accuracy_after.mean(),
                     "regular before": regular.accuracy_before.mean(), "regular": regular.accuracy_after.mean(),
                     "least regular": regular.accuracy_after.min(), "regular LPIPS": regular.lpips.mean(),
                     "protected LPIPS": part[part.status == "protected"].lpips.mean(),
                     "world": far(experiment.images(shifts, f"init-{variant.value}"), names)})
    return table, pd.DataFrame(rows)


def save_tables(table: pd.DataFrame, means: pd.DataFrame, path: Path) -> str:
    """Write PATH.csv (every row) and PATH.md (the means). Returns the means as Markdown."""
    text = to_markdown(means)
    with atomic_write(path.with_suffix(".csv")) as partial:
        table.to_csv(partial, index=False)
    write_text(path.with_suffix(".md"), text + "\n")
    return text


def save_ablation(table: pd.DataFrame, by: str, x: str, distance: str, path: Path, log: bool = False) -> str:
    """`save` a table with its means over `by` (status or prompt), and write PATH.png (their plot over `x`, the
    name of the value). Returns the means as Markdown."""
    named = table.assign(prompt=table.prompt.replace("", EMPTY_PROMPT_LABEL))
    means = named.groupby(["value", by], sort=False).agg(
        accuracy_before=("accuracy_before", "mean"), accuracy=("accuracy_after", "mean"), lpips=("lpips", "mean"),
        psnr=("psnr", mean_psnr), largest_pixel=("largest_pixel", "max"), steps=("steps", "first"), rank=("rank", "first"),
        **{distance: (distance, "mean")}).reset_index().rename(columns={"value": x})
    text = save_tables(table, means, path)
    measures = {"accuracy": "accuracy %", distance: distance, "lpips": "LPIPS"}
    plot_lines(means, x, {column: label for column, label in measures.items() if means[column].notna().any()}, by,
          path.with_suffix(".png"), log=log)
    return text
