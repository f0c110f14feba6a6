"""Images of the same prompts before and after an erasure: matched, labelled and compared prompt by prompt."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import torch

from ldm.config.concepts import erasable_concepts, get_concept
from ldm.io.errors import notify
from ldm.io.files import read_dir_metadata
from ldm.io.images import check_same_size, list_images, parse_case_number
from ldm.io.prompts import read_prompt_csv
from ldm.metrics.classify import Classifier, predict
from ldm.metrics.frechet import distance_column, extract_features, frechet_distance
from ldm.metrics.lpips import mean_psnr, pairwise_metrics
from ldm.metrics.statuses import GROUPS, shown_concept

ImagePair = tuple[Path, Path]  # by the original model, by the edited one

UNCHANGED_MAX_DIFF = 1  # of 255: two images that differ by one step of 8 bits are the same to rounding


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
    _check_comparable(original_dir, edited_dir)
    return [(original[name], edited[name]) for name in original]


# What two folders have in common if their images differ by the models' weights alone.
_SAMPLING = ("num_inference_steps", "guidance_scale", "scheduler", "scheduler_config")


def _check_comparable(original_dir: Path, edited_dir: Path) -> None:
    """Raise ValueError when two folders say that their images are of other prompts, seeds or sampling settings."""
    lists = [folder / "prompts.csv" for folder in (original_dir, edited_dir)]
    if all(path.is_file() for path in lists):
        check_same_cases(*lists)
    original, edited = (read_dir_metadata(folder) for folder in (original_dir, edited_dir))
    for name in _SAMPLING:
        if name in original and name in edited and original[name] != edited[name]:
            raise ValueError(
                f"{original_dir} and {edited_dir} were generated with another {name}: generate both with the same"
            )


def check_same_cases(first: Path, second: Path) -> None:
    """Raise ValueError when two prompt lists have another prompt or seed for one case number."""
    known = {case.case_number: case for case in read_prompt_csv(first)}
    for case in read_prompt_csv(second):
        if known.setdefault(case.case_number, case) != case:
            raise ValueError(
                f"case {case.case_number} is '{known[case.case_number].prompt}' with seed "
                f"{known[case.case_number].seed} in {first}, and '{case.prompt}' with seed {case.seed} in {second}: "
                "pass what belongs together"
            )


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
    own_list = image_dir / "prompts.csv"
    if prompts_path and own_list.is_file():
        check_same_cases(own_list, prompts_path)
    if prompts_path or own_list.is_file() or not any(map(_is_in_class_folder, images)):
        concepts = [shown_concept(category, prompt) for prompt in image_prompts(images, prompts_path or own_list)]
        indexes = [concept.index if concept else None for concept in concepts]
    else:
        indexes = [_class_folder_index(path, category) if _is_in_class_folder(path) else None for path in images]
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


def _is_in_class_folder(path: Path) -> bool:
    return re.fullmatch("[0-9]+", path.parent.name) is not None


def _class_folder_index(path: Path, category: str) -> int:
    """Return the number of an image's class folder. Raises ValueError when no concept has it."""
    last = len(erasable_concepts(category)) - 1
    if int(path.parent.name) > last:
        raise ValueError(f"{path} is in a class folder of no {category} concept: these are 0 to {last}")
    return int(path.parent.name)


def accuracy_by_prompt(
    classifier: Classifier | None, paths: Sequence[Path], prompts: Sequence[str], category: str
) -> pd.Series:
    """Return for each prompt the fraction, in per cent, of its images that the classifier takes for its concept.

    `prompts` are those of the images at `paths`, one each. NaN for a prompt of no concept, for a concept that the
    classifier does not know, with a notice, and without a classifier.
    """
    if classifier is None:
        return pd.Series(float("nan"), index=list(dict.fromkeys(prompts)))
    concepts = {prompt: shown_concept(category, prompt) for prompt in dict.fromkeys(prompts)}
    unknown = {concept.name for concept in concepts.values() if concept and not classifier.knows(concept)}
    if unknown:
        notify(f"the classifier does not know {', '.join(sorted(unknown))}, whose accuracy is left empty")
    scores = []
    for prompt, predicted in zip(prompts, predict(classifier, paths).tolist(), strict=True):
        concept = concepts[prompt]
        if concept is None or not classifier.knows(concept):
            scores.append(float("nan"))
        else:
            scores.append(100.0 * (predicted == concept.index + 1))
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

    Columns: prompt, images, accuracy_before and accuracy_after (in per cent), lpips (mean), unchanged (the fraction of
    image pairs whose largest pixel difference is at most 1/255), max_abs_diff (of 255), psnr (of the mean error, in
    dB), and the Frechet distance: fid where `inception_weights` are given, else fd_alexnet. Prompts of no concept of
    `category`, such as watermarks, have no accuracy, nor have concepts that the classifier does not know.

    Raises MissingFileError or ValueError when images, prompts or weights are missing or do not fit each other.
    """
    matched = match_images(original_dir, edited_dir)
    original_paths, edited_paths = [a for a, _ in matched], [b for _, b in matched]
    own_list = edited_dir / "prompts.csv"
    if own_list.is_file() and own_list != prompts_path:
        check_same_cases(own_list, prompts_path)
    prompts = image_prompts(edited_paths, prompts_path)
    check_same_size(original_paths[0], edited_paths[0])
    metrics = pairwise_metrics(original_paths, edited_paths, device)
    table = pd.DataFrame({"prompt": prompts, **{name: values.numpy() for name, values in metrics.items()}})
    table["unchanged"] = table["max_abs_diff"] <= UNCHANGED_MAX_DIFF
    result = table.groupby("prompt", sort=False).agg(
        images=("lpips", "size"),
        lpips=("lpips", "mean"),
        unchanged=("unchanged", "mean"),
        max_abs_diff=("max_abs_diff", "max"),
        psnr=("psnr", mean_psnr),
    )
    result.insert(1, "accuracy_before", accuracy_by_prompt(classifier, original_paths, prompts, category))
    result.insert(2, "accuracy_after", accuracy_by_prompt(classifier, edited_paths, prompts, category))
    result[distance_column(inception_weights)] = frechet_by_prompt(matched, prompts, device, inception_weights)
    return result.reset_index()


def describe_accuracy(table: pd.DataFrame) -> str:
    """Return the mean of an `accuracy_table` as a sentence; a notice names the concepts that are not known."""
    known = table.dropna()
    if len(known) < len(table):
        notify(f"the classifier does not know {', '.join(table.concept[table.accuracy.isna()])}")
    return f"mean accuracy {known.accuracy.mean():.2f} % of {len(known)} concepts, {known.images.sum()} images"


def frechet_by_prompt(
    matched: Sequence[ImagePair],
    prompts: Sequence[str],
    device: torch.device,
    inception_weights: Path | None = None,
    include_all: bool = False,
) -> pd.Series:
    """Return for each prompt the Frechet distance between the first and the second images of its pairs.

    `prompts` has one for each pair. With `include_all` the distance over all pairs follows, under the label `all`. NaN
    for a prompt with one pair.

    Raises ValueError when images differ in size, and when `inception_weights` is no file of FID's Inception.
    """
    check_same_size(*matched[0])
    original = extract_features([a for a, _ in matched], device, inception_weights)  # (N, F)
    edited = extract_features([b for _, b in matched], device, inception_weights)  # (N, F)
    labels = list(dict.fromkeys(prompts))
    rows_by_prompt = dict(pd.Series(range(len(matched))).groupby(list(prompts), sort=False).indices)
    distances = []
    for label in labels:
        selected = torch.from_numpy(rows_by_prompt[label])
        distances.append(frechet_distance(original[selected], edited[selected]))
    if include_all:  # beside a prompt that is called so too
        labels.append("all")
        distances.append(frechet_distance(original, edited))
    return pd.Series(distances, index=labels)


def summarize_by(table: pd.DataFrame, column: str) -> pd.DataFrame:
    """Return a row for each value of a column, group or status, that was added to a table of `compare`.

    Columns: that column, prompts and images (how many), lpips and unchanged (means over all images), max_abs_diff (of
    all images). The rows are in the order of `GROUPS`, other groups after them as they come.
    """
    rows = []
    for group in dict.fromkeys([*GROUPS, *table[column]]):
        members = table[table[column] == group]
        if members.empty:
            continue
        num_images = members["images"].sum()
        rows.append(
            {
                column: group,
                "prompts": len(members),
                "images": num_images,
                "lpips": (members["lpips"] * members["images"]).sum() / num_images,
                "unchanged": (members["unchanged"] * members["images"]).sum() / num_images,
                "max_abs_diff": members["max_abs_diff"].max(),
            }
        )
    return pd.DataFrame(rows)


def accuracy_table(
    classifier: Classifier, image_dir: Path, category: str, prompts_path: Path | None = None
) -> pd.DataFrame:
    """Return a row for each concept with images in `image_dir`: concept, images, accuracy (in per cent).

    A concept that the classifier does not know has NaN. Raises ValueError when it knows none of them, or `image_dir`
    has no image of a concept of `category`.
    """
    groups = group_by_concept(image_dir, category, prompts_path)
    concepts = [get_concept(category, index) for index in groups]
    if not any(map(classifier.knows, concepts)):
        raise ValueError(
            f"the classifier knows none of {', '.join(concept.name for concept in concepts)}: pass as `classifier` one "
            f"of category {category}"
        )
    rows = []
    for concept in concepts:
        paths, accuracy = groups[concept.index], float("nan")
        if classifier.knows(concept):
            accuracy = 100 * (predict(classifier, paths) == concept.index + 1).float().mean().item()
        rows.append({"concept": concept.name, "images": len(paths), "accuracy": accuracy})
    return pd.DataFrame(rows)
