"""TODO metrics.compare."""

from __future__ import annotations

from collections.abc import Sequence
import numpy as np
import pandas as pd
from pathlib import Path
import torch
from ldm.TODO.ldm.metrics import frechet
from ldm.config.concepts import get_concept, match_concept
from ldm.io.images import list_images, parse_case_number
from ldm.io.prompts import read_prompt_csv
from ldm.metrics.classify import Classifier, predict
from ldm.metrics.lpips import mean_psnr, pairwise_metrics


def _index_by_name(folder: Path) -> dict[str, Path]:
    """The images below `folder`, in class folders or not, by file name. Raises ValueError when two have the same name."""
    images = list_images(folder, "make it with python eval-scripts/generate-images-merge.py")
    named = {path.name: path for path in images}
    for path in images:
        if named[path.name] != path:
            raise ValueError(f"{path} and {named[path.name]} have the same name, so that images cannot be paired by it: "
                             "pass a folder of one model's images")
    return named


def match_images(before: Path, after: Path) -> list[tuple[Path, Path]]:
    """Images of the same name in two folders. Raises ValueError when either has one that the other lacks."""
    first, second = _index_by_name(before), _index_by_name(after)
    alone = set(first) ^ set(second)
    if alone:
        name = min(alone)
        raise ValueError(f"{name} is in only one of {before} and {after} ({len(alone)} such): "
                         "generate both from the same prompts")
    return [(first[name], second[name]) for name in first]


def image_prompts(paths: Sequence[Path], prompts: Path) -> list[str]:
    """The prompt of each image, by the case number in its name. Raises ValueError when `prompts` lacks a case."""
    known = {case.number: case.prompt for case in read_prompt_csv(prompts)}
    foreign = [path for path in paths if parse_case_number(path) not in known]
    if foreign:
        raise ValueError(f"{prompts} has no case {parse_case_number(foreign[0])}, which {foreign[0]} shows: "
                         "pass the list that the images were made from to --prompts_path")
    return [known[parse_case_number(path)] for path in paths]


def image_labels(folder: Path, paths: Sequence[Path]) -> list[str]:
    """What each image of `folder` shows: its prompt where `prompts.csv` is there, else the name of its class folder."""
    prompts = folder / "prompts.csv"
    return image_prompts(paths, prompts) if prompts.is_file() else [path.parent.name for path in paths]


def group_by_concept(folder: Path, category: str, prompts: Path | None = None) -> dict[int, list[Path]]:
    """Images by concept index: from the prompts of their cases, or, where there is no prompt list, from class folders
    0, 1, ...

    The prompts are those of `prompts`, or of `prompts.csv` in the folder. Images of no concept are left out; raises
    ValueError when none is left.
    """
    images = list_images(folder, "make it with python eval-scripts/generate-images-merge.py")
    prompts = prompts or folder / "prompts.csv"
    if prompts.is_file() or not any(path.parent.name.isdigit() for path in images):
        indexes = [_index(category, prompt) for prompt in image_prompts(images, prompts)]
    else:
        indexes = [int(path.parent.name) if path.parent.name.isdigit() else None for path in images]
    groups: dict[int, list[Path]] = {}
    for index, path in zip(indexes, images):
        if index is not None:
            groups.setdefault(index, []).append(path)
    if not groups:
        raise ValueError(f"no image in {folder} shows a concept of category {category}: pass --path a folder of such images")
    return dict(sorted(groups.items()))


def _index(category: str, prompt: str) -> int | None:
    concept = match_concept(category, prompt)
    return None if concept is None or concept.watermark else concept.index


def accuracy_by_prompt(classifier: Classifier | None, paths: Sequence[Path], prompts: Sequence[str],
                       category: str) -> pd.Series:
    """For each prompt the share (in per cent) of its images that are taken for its concept; NaN for no concept's, and
    without a classifier.

    `prompts` are those of the images at `paths`, one each.
    """
    if classifier is None:
        return pd.Series(float("nan"), index=list(dict.fromkeys(prompts)))
    labels = {prompt: _index(category, prompt) for prompt in dict.fromkeys(prompts)}
    right = [float("nan") if labels[prompt] is None else 100.0 * (found == labels[prompt] + 1)
             for prompt, found in zip(prompts, predict(classifier, paths).tolist())]
    return pd.Series(right).groupby(list(prompts), sort=False).mean()


def compare(before: Path, after: Path, prompts: Path, category: str, classifier: Classifier | None, device: torch.device,
            inception: Path | None = None) -> pd.DataFrame:
    """One row per prompt: images, accuracy before and after (in per cent), mean LPIPS, largest pixel difference, PSNR in
    dB, and the Frechet distance, `fid` where `inception` has its weights, else `fd_alexnet`.

    `prompts` is the prompt list of both. Prompts of no concept of `category`, such as watermarks, have no accuracy.
    """
    matched = match_images(before, after)
    measured = pairwise_metrics([a for a, _ in matched], [b for _, b in matched], device)
    table = pd.DataFrame({"prompt": image_prompts([b for _, b in matched], prompts),
                          **{name: values.numpy() for name, values in measured.items()}})
    result = table.groupby("prompt", sort=False).agg(
        images=("lpips", "size"), lpips=("lpips", "mean"), largest_pixel=("pixel", "max"), psnr=("psnr", mean_psnr))
    for place, name, side in ((1, "accuracy_before", 0), (2, "accuracy_after", 1)):
        paths = [pair[side] for pair in matched]
        result.insert(place, name, accuracy_by_prompt(classifier, paths, table.prompt, category))
    result[frechet.column(inception)] = frechet_by_prompt(matched, table.prompt, device, inception)
    return result.reset_index()


def frechet_by_prompt(matched: Sequence[tuple[Path, Path]], prompts: Sequence[str], device: torch.device,
                      inception: Path | None = None, whole: bool = False) -> pd.Series:
    """For each prompt the Frechet distance between the first and the second pictures of its pairs; `prompts` has one for
    each pair. With `whole` that of all of them too, under `all`."""
    sides = [frechet.features([pair[side] for pair in matched], device, inception) for side in (0, 1)]
    places = dict(pd.Series(range(len(matched))).groupby(list(prompts), sort=False).indices)
    if whole:
        places["all"] = np.arange(len(matched))
    return pd.Series({prompt: frechet.frechet(*(side[torch.from_numpy(rows)] for side in sides))
                      for prompt, rows in places.items()})


def accuracy_table(classifier: Classifier, folder: Path, category: str, prompts: Path | None = None) -> pd.DataFrame:
    """One row per concept with images in `folder`: how many, and the share (in per cent) taken for that concept."""
    rows = [{"concept": get_concept(category, index).name, "images": len(paths),
             "accuracy": 100 * (predict(classifier, paths) == index + 1).float().mean().item()}
            for index, paths in group_by_concept(folder, category, prompts).items()]
    return pd.DataFrame(rows)
