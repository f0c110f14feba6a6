"""All methods side by side on one model: what is left of the erased concepts, and what becomes of everything else."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
from PIL import Image

from ldm.config.concepts import (
    EMPTY_PROMPT_LABEL,
    always_protected_prompts,
    concept_status,
    erasable_concepts,
    get_concept,
)
from ldm.config.everyday import COMPOSED_WITH, compositions, sample_unprotected
from ldm.config.methods import MethodConfig, SRSMEConfig
from ldm.config.templates import fill, load_template_set
from ldm.erasure.merge import describe_forms
from ldm.erasure.shift import WeightShift
from ldm.experiments.experiment import Experiment
from ldm.io.files import write_json
from ldm.io.image_grid import image_grid
from ldm.io.images import image_filename, open_image
from ldm.io.paths import ArtifactPaths
from ldm.io.prompts import PromptCase, make_cases
from ldm.metrics.classify import Classifier
from ldm.metrics.compare import accuracy_by_prompt
from ldm.metrics.tables import to_markdown

LEFT = ("names", "held-out templates", "erased compositions")  # the groups of prompts that say an erased concept
CHANGED = (
    "protected",
    "restored",
    "other category",
    "compositions",
    "kin",
    "captions",
    "words",
)  # and those that say none
PLOTTED = {
    "captions LPIPS": "LPIPS of captions",
    "compositions LPIPS": "LPIPS of compositions",
    "kin LPIPS": "LPIPS of kin",
}
_IN_GRID = 3  # prompts of each group
_RETAIN_SCALES = ("vocab_preserve_scale", "captions_preserve_scale", "neutral_preserve_scale", "others_preserve_scale")
_WORDS_ALONE = {  # the closed form before it had a retain set
    "anchor": "empty", "template_set": "category", "target_templates": 6, "vocab_preserve_scale": 10.0,
    "captions_preserve_scale": 0.0, "neutral_preserve_scale": 0.0, "others_preserve_scale": 0.0,
}  # fmt: skip


@dataclass(frozen=True)
class Contender:
    """A way to erase: a method's settings, and the form in which its shifts act. `line` is what joins it to others."""

    name: str
    line: str
    config: MethodConfig
    form: str = "linear"


def list_contenders(
    methods: Sequence[str], configs: Mapping[str, MethodConfig], retain_factors: Sequence[float]
) -> list[Contender]:
    """Return the contenders of the methods.

    SRS-ME is there gated; linear, with the weights of its retain set multiplied by each of `retain_factors`; linear
    with the words of the vocabulary alone and the empty prompt as anchor; and trained. Other methods are there once.
    """

    def of_srsme(config: SRSMEConfig) -> list[Contender]:
        closed = config.with_changes(mode="closed_form", init="closed_form")
        found = [Contender("SRS-ME gated", "SRS-ME gated", closed, "gated")]
        for factor in retain_factors:
            scales = {name: factor * getattr(config, name) for name in _RETAIN_SCALES}
            found.append(Contender(f"SRS-ME linear {factor:g}", "SRS-ME linear", closed.with_changes(**scales)))
        words_alone = closed.with_changes(**_WORDS_ALONE)
        found.append(Contender("SRS-ME linear, words alone", "SRS-ME linear, words alone", words_alone))
        return [*found, Contender("SRS-ME trained", "SRS-ME trained", config.with_changes(mode="learn"))]

    return contenders_of(methods, configs, of_srsme)


def contenders_of(
    methods: Sequence[str],
    configs: Mapping[str, MethodConfig],
    of_srsme: Callable[[SRSMEConfig], Sequence[Contender]],
) -> list[Contender]:
    """Return the contenders of methods: those of SRS-ME by `of_srsme`, and each other method once."""
    found: list[Contender] = []
    for method in methods:
        config = configs[method]
        found += of_srsme(config) if type(config) is SRSMEConfig else [Contender(method, method, config)]
    return found


def prompt_groups(category: str, erased: Sequence[int], num: int) -> dict[str, list[str]]:
    """Return the prompts of each group of `LEFT` and `CHANGED`: `num` of each group that nobody lists.

    The concepts of the category that are not `erased` are `restored`. The `other category` is the one
    that compositions say too.
    """
    concepts = erasable_concepts(category)
    groups: dict[str, list[str]] = {"names": [], "held-out templates": [], "restored": []}
    for concept in concepts:
        spellings = list(dict.fromkeys(concept.spellings))
        held_out = [fill(text, concept.prompt) for text in load_template_set(concept.kind).held_out_templates]
        if concept.index in erased:
            groups["names"] += spellings
            groups["held-out templates"] += held_out
        else:
            groups["restored"] += [*spellings, *held_out]
    for prompt in compositions(category, num * len(concepts)):
        is_erased = concept_status(category, prompt, erased) == "erased"
        groups.setdefault("erased compositions" if is_erased else "compositions", []).append(prompt)
    if category in COMPOSED_WITH:
        groups["other category"] = [concept.prompt for concept in erasable_concepts(COMPOSED_WITH[category])]
    everyday = sample_unprotected(category, num * len(concepts))
    groups |= {name: everyday[name] for name in ("captions", "words", "kin")}
    groups["protected"] = always_protected_prompts()
    return {name: groups[name] for name in (*LEFT, *CHANGED) if groups.get(name)}


class MethodComparison:
    """What contenders make of the same prompts, erasing the same concepts of a category of one model.

    Shifts are kept below `artifacts_dir`, and images below the experiment's folder, each made once. `second_classifier`
    tells the concepts of the category that compositions say too.
    """

    def __init__(
        self,
        experiment: Experiment,
        artifacts_dir: Path,
        erased: Sequence[int],
        groups: Mapping[str, Sequence[str]],
        second_classifier: Classifier | None,
    ):
        self.experiment, self.artifacts_dir, self.erased = experiment, artifacts_dir, erased
        self.second_classifier = second_classifier
        self.folders: dict[str, Path] = {}  # of images, of each contender that was measured
        self.groups: dict[str, str] = {}  # of each prompt
        for name, prompts in groups.items():
            for prompt in prompts:
                self.groups.setdefault(prompt, name)

    def erase(self, contender: Contender) -> tuple[dict[str, WeightShift], float]:
        """Return the shifts of a contender by label, made where they are not there, and the seconds that they took.

        These are NaN where a run that was stopped made a shift and could not note its time.
        """
        category = self.experiment.category
        folder = self.artifacts_dir / _file_name(contender.name)
        artifacts = ArtifactPaths(folder, contender.config.name, self.experiment.model.name, category, 0, 0)
        concepts = [get_concept(category, index) for index in self.erased]
        protected = [concept.index for concept in erasable_concepts(category)]
        experiment = replace(self.experiment, form=contender.form)
        times_path = folder / "seconds.json"  # of shifts that an earlier run made too
        times = json.loads(times_path.read_text(encoding="utf-8")) if times_path.is_file() else {}
        config = contender.config
        one_by_one = config.trains and not config.is_joint  # else what they share is computed once
        for together in [[concept] for concept in concepts] if one_by_one else [concepts]:
            summaries = experiment.erase(artifacts, together, protected, contender.config)
            times |= {summary.concept: summary.seconds for summary in summaries}
            write_json(times_path, times)
        took = [times.get(concept.name, float("nan")) for concept in concepts]
        shifts = {str(index): WeightShift.load(artifacts.shift(index)) for index in self.erased}
        return shifts, took[0] if config.is_joint else sum(took)

    def measure(self, contender: Contender | None) -> pd.DataFrame:
        """Return a row for each prompt: contender, line, seconds, group, `shown`, and the columns of `compare`.

        `shown` is the percentage of images in which the second classifier sees what a composition says beside the
        concept. None is the original model.
        """
        shifts, seconds, name, line, form = {}, float("nan"), "original", "original", "linear"
        if contender is not None:
            (shifts, seconds), name, line = self.erase(contender), contender.name, contender.line
            form = contender.form
            print(f"{name}: {describe_forms(shifts, form)}", flush=True)
        experiment, cases = replace(self.experiment, form=form), self._cases()
        table, folder = experiment.evaluate_cases(shifts, _file_name(name), "methods", cases)
        self.folders[name] = folder
        table.insert(1, "group", [self.groups[prompt] for prompt in table["prompt"]])
        second = COMPOSED_WITH.get(experiment.category, "")
        paths = [folder / image_filename(case.case_number, 0) for case in cases]
        prompts = [case.prompt for case in cases]
        shown = accuracy_by_prompt(self.second_classifier, paths, prompts, second)
        table.insert(2, "shown", table["prompt"].map(shown))
        for number, (column, value) in enumerate((("contender", name), ("line", line), ("seconds", seconds))):
            table.insert(number, column, value)
        return table

    def _cases(self) -> list[PromptCase]:
        return make_cases(list(self.groups), self.experiment.seeds_per_prompt, self.experiment.seed)

    def grid(self) -> Image.Image:
        """Return a grid of the first image of some prompts of each group, by each contender that was measured."""
        first: dict[str, str] = {}
        for case in self._cases():
            first.setdefault(case.prompt, image_filename(case.case_number, 0))
        shown: dict[str, list[str]] = {}
        for prompt, group in self.groups.items():
            shown.setdefault(group, []).append(prompt)
        rows = []
        for prompts in shown.values():
            for prompt in prompts[:: -(-len(prompts) // _IN_GRID)]:
                cells = [[open_image(folder / first[prompt])] for folder in self.folders.values()]
                rows.append((prompt or EMPTY_PROMPT_LABEL, cells))
        return image_grid(rows, [name.replace(" ", "\n") for name in self.folders])


def _file_name(contender: str) -> str:
    return contender.replace(",", "").replace(" ", "-")


def summarize(table: pd.DataFrame) -> pd.DataFrame:
    """Return a row for each contender: what is left of what it erased, in per cent, and what became of the rest.

    Columns: contender, line, seconds, `left` (the mean over `LEFT`) and each group of `LEFT`, `shown` (what erased
    compositions say beside the concept, in per cent), `restored` accuracy, and for each group of `CHANGED` its LPIPS
    and the fraction of images that are unchanged.
    """
    rows = []
    for name, part in table.groupby("contender", sort=False):
        groups = dict(list(part.groupby("group", sort=False)))
        left = {group: groups[group]["accuracy_after"].mean() for group in LEFT if group in groups}
        row: dict[str, Any] = {"contender": name, "line": part["line"].iloc[0], "seconds": part["seconds"].iloc[0]}
        row |= {"left": sum(left.values()) / len(left), **left}
        if "erased compositions" in groups:
            row["shown"] = groups["erased compositions"]["shown"].mean()
        if "restored" in groups:
            row["restored accuracy"] = groups["restored"]["accuracy_after"].mean()
        if "other category" in groups:
            row["other category shown"] = groups["other category"]["shown"].mean()
        for group in CHANGED:
            if group in groups:
                row[f"{group} LPIPS"] = groups[group]["lpips"].mean()
                row[f"{group} unchanged"] = groups[group]["unchanged"].mean()
        rows.append(row)
    return pd.DataFrame(rows)


def summary_markdown(summary: pd.DataFrame) -> str:
    """Return two tables as Markdown: what is left and shown; and LPIPS and unchanged of every other group."""
    changed = [str(column) for column in summary if str(column).endswith((" LPIPS", " unchanged"))]
    first = summary.drop(columns=[*changed, "line"])
    second = summary[["contender"]].copy()
    for group in CHANGED:
        if f"{group} LPIPS" in changed:
            values = zip(summary[f"{group} LPIPS"], summary[f"{group} unchanged"], strict=True)
            second[group] = [f"{lpips:.3f} / {100 * unchanged:.0f} %" for lpips, unchanged in values]
    return f"{to_markdown(first)}\n\nLPIPS / unchanged:\n\n{to_markdown(second)}"
