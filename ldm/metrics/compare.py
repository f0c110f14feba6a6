"""Images of the same prompts before and after an erasure: matched, labelled and compared prompt by prompt."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from ldm.config.concepts import get_concept, match_concept
from ldm.io.images import list_images, parse_case_number
from ldm.io.prompts import read_prompt_csv
from ldm.metrics.classify import Classifier, predict
from ldm.metrics.frechet import distance_column, extract_features, frechet_distance
from ldm.metrics.lpips import mean_psnr, pairwise_metrics

ImagePair = tuple[Path, Path]  # by the original model, by the edited one


def _index_by_name(folder: Path) -> dict[str, Path]:
    """Return the images below `folder`, in class folders or not, by file name.

    Raises ValueError when two have the same name.
    """
    images = list_images(folder)
    by_name = {path.name: path for path in images}
    for path in images:
        if by_name[path.name] != path:
            raise ValueError(
                f"{path} and {by_name[path.name]} have the same name, so that images cannot be paired by it: pass a "
                "folder of one model's images"
            )
    return by_name


def match_images(original_dir: Path, edited_dir: Path) -> list[ImagePair]:
    """Return the pairs of images of the same name in two folders.

    Raises ValueError when either has one that the other lacks.
    """
    original, edited = _index_by_name(original_dir), _index_by_name(edited_dir)
    unpaired = set(original) ^ set(edited)
    if unpaired:
        raise ValueError(
            f"{min(unpaired)} is in only one of {original_dir} and {edited_dir} ({len(unpaired)} such): generate both "
            "from the same prompts"
        )
    return [(original[name], edited[name]) for name in original]


def image_prompts(paths: Sequence[Path], prompts_path: Path) -> list[str]:
    """Return the prompt of each image, by the case number in its name.

    Raises ValueError when the prompt list lacks a case.
    """
    prompts = {case.case_number: case.prompt for case in read_prompt_csv(prompts_path)}
    unknown = [path for path in paths if parse_case_number(path) not in prompts]
    if unknown:
        raise ValueError(
            f"{prompts_path} has no case {parse_case_number(unknown[0])}, which {unknown[0]} shows: pass as "
            "`prompts_path` the list that the images were generated from"
        )
    return [prompts[parse_case_number(path)] for path in paths]


def image_labels(image_dir: Path, paths: Sequence[Path]) -> list[str]:
    """Return what each image shows: its prompt where `image_dir` has prompts.csv, else the name of its class folder."""
    prompts_path = image_dir / "prompts.csv"
    if prompts_path.is_file():
        return image_prompts(paths, prompts_path)
    return [path.parent.name for path in paths]


def group_by_concept(image_dir: Path, category: str, prompts_path: Path | None = None) -> dict[int, list[Path]]:
    """Return the images of each concept, by its index.

    The concept is that of the image's prompt, in the list at `prompts_path` or in `image_dir`/prompts.csv; where there
    is no list, the image's class folder 0, 1, ... is the index. Images of no concept are left out.

    Raises ValueError when none is left.
    """
    images = list_images(image_dir)
    prompts_path = prompts_path or image_dir / "prompts.csv"
    if prompts_path.is_file() or not any(path.parent.name.isdigit() for path in images):
        indexes = [_concept_index(category, prompt) for prompt in image_prompts(images, prompts_path)]
    else:
        indexes = [int(path.parent.name) if path.parent.name.isdigit() else None for path in images]
    groups: dict[int, list[Path]] = {}
    for index, path in zip(indexes, images, strict=True):
        if index is not None:
            groups.setdefault(index, []).append(path)
    if not groups:
        raise ValueError(
            f"no image in {image_dir} shows a concept of category {category}: pass as `image_dir` a folder of such "
            "images"
        )
    return dict(sorted(groups.items()))


def _concept_index(category: str, prompt: str) -> int | None:
    """Return the index of the concept that a prompt names; None for none, and for a watermark."""
    concept = match_concept(category, prompt)
    return None if concept is None or concept.is_watermark else concept.index


def accuracy_by_prompt(
    classifier: Classifier | None, paths: Sequence[Path], prompts: Sequence[str], category: str
) -> pd.Series:
    """Return for each prompt the fraction, in per cent, of its images that the classifier takes for its concept.

    `prompts` are those of the images at `paths`, one each. NaN for a prompt of no concept, and without a classifier.
    """
    if classifier is None:
        return pd.Series(float("nan"), index=list(dict.fromkeys(prompts)))
    indexes = {prompt: _concept_index(category, prompt) for prompt in dict.fromkeys(prompts)}
    scores = []
    for prompt, predicted in zip(prompts, predict(classifier, paths).tolist(), strict=True):
        index = indexes[prompt]
        scores.append(float("nan") if index is None else 100.0 * (predicted == index + 1))
    return pd.Series(pd.Series(scores).groupby(list(prompts), sort=False).mean())


def compare(
    original_dir: Path,
    edited_dir: Path,
    prompts_path: Path,
    category: str,
    classifier: Classifier | None,
    device: torch.device,
    inception_weights: Path | None = None,
) -> pd.DataFrame:
    """Return a row for each prompt of two folders of images from the prompt list at `prompts_path`.

    Columns: prompt, images, accuracy_before and accuracy_after (in per cent), lpips (mean), max_abs_diff (of 255), psnr
    (of the mean error, in dB), and the Frechet distance: fid where `inception_weights` are given, else fd_alexnet.
    Prompts of no concept of `category`, such as watermarks, have no accuracy.

    Raises MissingFileError or ValueError when images, prompts or weights are missing or do not fit each other.
    """
    matched = match_images(original_dir, edited_dir)
    original_paths, edited_paths = [a for a, _ in matched], [b for _, b in matched]
    metrics = pairwise_metrics(original_paths, edited_paths, device)
    prompts = image_prompts(edited_paths, prompts_path)
    table = pd.DataFrame({"prompt": prompts, **{name: values.numpy() for name, values in metrics.items()}})
    result = table.groupby("prompt", sort=False).agg(
        images=("lpips", "size"),
        lpips=("lpips", "mean"),
        max_abs_diff=("max_abs_diff", "max"),
        psnr=("psnr", mean_psnr),
    )
    result.insert(1, "accuracy_before", accuracy_by_prompt(classifier, original_paths, prompts, category))
    result.insert(2, "accuracy_after", accuracy_by_prompt(classifier, edited_paths, prompts, category))
    result[distance_column(inception_weights)] = frechet_by_prompt(matched, prompts, device, inception_weights)
    return result.reset_index()


def frechet_by_prompt(
    matched: Sequence[ImagePair],
    prompts: Sequence[str],
    device: torch.device,
    inception_weights: Path | None = None,
    include_all: bool = False,
) -> pd.Series:
    """Return for each prompt the Frechet distance between the first and the second images of its pairs.

    `prompts` has one for each pair. With `include_all` the distance over all pairs follows, under the label `all`.

    Raises ValueError when `inception_weights` is no file of FID's Inception.
    """
    original = extract_features([a for a, _ in matched], device, inception_weights)  # (N, F)
    edited = extract_features([b for _, b in matched], device, inception_weights)  # (N, F)
    rows_by_prompt = dict(pd.Series(range(len(matched))).groupby(list(prompts), sort=False).indices)
    if include_all:
        rows_by_prompt["all"] = np.arange(len(matched))
    distances = {}
    for prompt, rows in rows_by_prompt.items():
        selected = torch.from_numpy(rows)
        distances[prompt] = frechet_distance(original[selected], edited[selected])
    return pd.Series(distances)


def accuracy_table(
    classifier: Classifier, image_dir: Path, category: str, prompts_path: Path | None = None
) -> pd.DataFrame:
    """Return a row for each concept with images in `image_dir`: concept, images, accuracy (in per cent).

    Raises ValueError when `image_dir` has no image of a concept of `category`.
    """
    rows = []
    for index, paths in group_by_concept(image_dir, category, prompts_path).items():
        accuracy = 100 * (predict(classifier, paths) == index + 1).float().mean().item()
        rows.append({"concept": get_concept(category, index).name, "images": len(paths), "accuracy": accuracy})
    return pd.DataFrame(rows)
