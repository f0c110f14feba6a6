"""Two folders of images from the same prompts and seeds, before and after an erasure: one row per concept."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import torch

from ldm.concepts import concept_in, get_concept
from ldm.images import case_number, list_images, read_cases
from ldm.metrics.classify import Classifier, predict
from ldm.metrics.perceptual import distances


def by_name(folder: Path) -> dict[str, Path]:
    """The images below `folder`, in class folders or not, by file name."""
    return {path.name: path for path in list_images(folder, "make it with python eval-scripts/generate-images-merge.py")}


def pairs(before: Path, after: Path) -> list[tuple[Path, Path]]:
    """Images of the same name in two folders. Raises ValueError when either has one that the other lacks."""
    first, second = by_name(before), by_name(after)
    alone = set(first) ^ set(second)
    if alone:
        name = min(alone)
        raise ValueError(f"{name} is in only one of {before} and {after} ({len(alone)} such): "
                         "generate both from the same prompts")
    return [(first[name], second[name]) for name in first]


def by_concept(folder: Path, category: str, prompts: Path | None = None) -> dict[int, list[Path]]:
    """Images by concept index: from class folders 0, 1, ... if there are any, else from the prompts of their cases.

    The prompts are those of `prompts`, or of `prompts.csv` in the folder. Images of no concept are left out.
    """
    groups: dict[int, list[Path]] = {}
    known = None
    for path in list_images(folder, "make it with python eval-scripts/generate-images-merge.py"):
        if path.parent != folder and path.parent.name.isdigit():
            index = int(path.parent.name)
        else:
            if known is None:
                cases = read_cases(prompts or folder / "prompts.csv")
                known = {case.number: _index(category, case.prompt) for case in cases}
            index = known.get(case_number(path))
        if index is not None:
            groups.setdefault(index, []).append(path)
    if not groups:
        raise ValueError(f"no image in {folder} belongs to a concept of this category: check --erase_cat")
    return dict(sorted(groups.items()))


def _index(category: str, prompt: str) -> int | None:
    concept = concept_in(category, prompt)
    return None if concept is None or concept.watermark else concept.index


def compare(before: Path, after: Path, prompts: Path, category: str,
            classifier: Classifier, device: torch.device) -> pd.DataFrame:
    """One row per prompt: images, accuracy before and after (in per cent), mean LPIPS, largest pixel difference, PSNR.

    `prompts` is the prompt list of both. Prompts of no concept of `category`, such as watermarks, have no accuracy.
    """
    prompt_of = {case.number: case.prompt for case in read_cases(prompts)}
    matched = pairs(before, after)
    measured = distances([a for a, _ in matched], [b for _, b in matched], device)
    table = pd.DataFrame({"prompt": [prompt_of[case_number(a)] for a, _ in matched],
                          **{name: values.numpy() for name, values in measured.items()}})
    label_of = {prompt: _index(category, prompt) for prompt in table.prompt.unique()}
    table["label"] = [-1 if label_of[prompt] is None else label_of[prompt] + 1 for prompt in table.prompt]
    for name, side in (("accuracy_before", 0), ("accuracy_after", 1)):
        hit = predict(classifier, [pair[side] for pair in matched]).numpy() == table.label
        table[name] = (hit * 100.0).where(table.label > 0)
    return table.groupby("prompt", sort=False).agg(
        images=("lpips", "size"), accuracy_before=("accuracy_before", "mean"), accuracy_after=("accuracy_after", "mean"),
        lpips=("lpips", "mean"), largest_pixel=("pixel", "max"), psnr=("psnr", "mean")).reset_index()


def accuracy_table(classifier: Classifier, folder: Path, category: str, prompts: Path | None = None) -> pd.DataFrame:
    """One row per concept with images in `folder`: how many, and the share (in per cent) taken for that concept."""
    rows = [{"concept": get_concept(category, index).name, "images": len(paths),
             "accuracy": 100 * (predict(classifier, paths) == index + 1).float().mean().item()}
            for index, paths in by_concept(folder, category, prompts).items()]
    return pd.DataFrame(rows)


def to_markdown(table: pd.DataFrame) -> str:
    """A table as Markdown, numbers with few digits."""
    def cell(value) -> str:
        if isinstance(value, float):
            return "" if value != value else f"{value:.4g}"
        return str(value)
    lines = ["| " + " | ".join(table.columns) + " |", "|" + " --- |" * len(table.columns)]
    return "\n".join(lines + ["| " + " | ".join(map(cell, row)) + " |" for row in table.itertuples(index=False)])
