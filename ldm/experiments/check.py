"""A check of an erasure by a few images: generated before and after, side by side in a grid, with numbers beside it."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from PIL import Image

from ldm.config.concepts import EMPTY_PROMPT_LABEL
from ldm.config.methods import SamplingConfig
from ldm.diffusion.model import DiffusionModel
from ldm.diffusion.sampling import generate
from ldm.erasure.merge import edited, shifts_metadata
from ldm.erasure.shift import WeightShift
from ldm.io.errors import notify
from ldm.io.files import atomic_write_dir, write_json
from ldm.io.image_grid import image_grid
from ldm.io.images import image_filename, open_image, save_image
from ldm.io.prompts import PromptCase, write_prompt_csv
from ldm.metrics.clip_score import ClipScorer
from ldm.metrics.lpips import MIN_IMAGE_SIZE, pairwise_metrics

MAX_PROMPTS = 10  # that a check generates images of
TABLE_FILE, GRID_FILE = "check.csv", "check.png"
_SIDES = ("before", "after")
_HARDLY = 0.05  # LPIPS between images of an erased concept: mini-sd's have 0.03 for words that it does not know
_IN_CELL, _CELL_SIZE = 4, 128  # images of a cell of the grid, and at most so many pixels on a side


@dataclass(frozen=True)
class CheckRequest:
    """How a check is made: `num_images` of each prompt, into `output_dir`, and the folder of a CLIP model, if any."""

    num_images: int
    output_dir: Path
    sampling: SamplingConfig
    clip_path: Path | None = None

    def __post_init__(self) -> None:
        if self.num_images < 1:
            raise ValueError(f"`check` {self.num_images} generates nothing: give the images of each prompt, such as 4")
        if self.output_dir.exists() and not (self.output_dir / TABLE_FILE).is_file():
            raise ValueError(f"{self.output_dir} holds something else than a check: choose another folder, or move it")


def choose_prompts(
    prompts: Mapping[str, Sequence[str]], limit: int = MAX_PROMPTS
) -> tuple[list[tuple[str, str]], list[str]]:
    """Return up to `limit` prompts, each with its group, the first of each group first; and those that are left out.

    A prompt of two groups counts as the former's.
    """
    groups: dict[str, str] = {}
    for group, members in prompts.items():
        for prompt in members:
            groups.setdefault(prompt, group)
    columns = [[prompt for prompt, own in groups.items() if own == group] for group in prompts]
    by_turns = [prompt for row in itertools.zip_longest(*columns) for prompt in row if prompt is not None]
    chosen = set(by_turns[:limit])
    return [(groups[prompt], prompt) for prompt in groups if prompt in chosen], by_turns[limit:]


def check_erasure(
    model: DiffusionModel,
    shifts: Mapping[str, WeightShift],
    form: str,
    prompts: Mapping[str, Sequence[str]],
    request: CheckRequest,
) -> pd.DataFrame:
    """Generate images of prompts by the model and by the one edited by `shifts`; return a row for each prompt.

    `prompts` are those of the groups `erased` and `protected`, of which ten are taken, with the seeds 0, 1, ... The
    folder gets the images, the table, and a grid of the first images of each prompt. Columns: group, prompt, images,
    lpips (mean), max_abs_diff (the largest of a pixel, of 255), and with a CLIP model clip_before and clip_after, which
    the empty prompt has none of. Raises ValueError for no prompt, and before any image for what cannot be measured.
    """
    chosen, left_out = choose_prompts(prompts)
    if not chosen:
        raise ValueError("`check` has no prompt: name a concept")
    if model.image_size < MIN_IMAGE_SIZE:
        raise ValueError(f"`check` compares by LPIPS, which needs images of {MIN_IMAGE_SIZE} pixels on a side")
    scorer = ClipScorer.load(request.clip_path, model.device) if request.clip_path else None
    if left_out:
        notify(f"`check` takes {len(chosen)} prompts, and leaves out {len(left_out)}: {', '.join(left_out)}")
    cases = _make_cases([prompt for _, prompt in chosen], request.num_images)
    metadata = {**shifts_metadata(shifts, form), **model.generation_metadata, **request.sampling.to_dict()}
    with atomic_write_dir(request.output_dir) as folder:
        _generate(model, cases, request.sampling, folder / _SIDES[0])
        with edited(model, shifts, form):
            _generate(model, cases, request.sampling, folder / _SIDES[1])
        table = _measure(chosen, cases, folder, model.device, scorer)
        table.to_csv(folder / TABLE_FILE, index=False)
        save_image(folder / GRID_FILE, _grid(chosen, cases, folder))
        write_prompt_csv(folder / "prompts.csv", cases)
        write_json(folder / "metadata.json", metadata)
    for row in table[(table["group"] == "erased") & (table["lpips"] < _HARDLY)].to_dict("records"):
        notify(
            f"the images of '{row['prompt']}' hardly change (LPIPS {row['lpips']:.3f}): either the model does not know "
            "it, or what takes its place looks the same: look at the grid, and give another `anchor`"
        )
    return table


def _make_cases(prompts: Sequence[str], num_images: int) -> list[PromptCase]:
    """Return a case for each prompt and seed, in this order."""
    pairs = itertools.product(prompts, range(num_images))
    return [PromptCase(prompt, seed, number) for number, (prompt, seed) in enumerate(pairs)]


def _generate(model: DiffusionModel, cases: Sequence[PromptCase], sampling: SamplingConfig, folder: Path) -> None:
    """Write the image of each case into a folder."""
    folder.mkdir()
    for case, _, image in generate(model, [(case, 0) for case in cases], sampling):
        save_image(folder / image_filename(case.case_number, 0), image)


def _paths(cases: Sequence[PromptCase], folder: Path) -> list[Path]:
    return [folder / image_filename(case.case_number, 0) for case in cases]


def _measure(
    chosen: Sequence[tuple[str, str]],
    cases: Sequence[PromptCase],
    folder: Path,
    device: torch.device,
    scorer: ClipScorer | None,
) -> pd.DataFrame:
    """Return a row for each of the (group, prompt) pairs, as `check_erasure` describes it."""
    before, after = (_paths(cases, folder / side) for side in _SIDES)
    measured = pairwise_metrics(before, after, device)
    images = pd.DataFrame({name: measured[name].numpy() for name in ("lpips", "max_abs_diff")})
    images["prompt"] = [case.prompt for case in cases]
    columns = {"images": ("lpips", "size"), "lpips": ("lpips", "mean"), "max_abs_diff": ("max_abs_diff", "max")}
    if scorer is not None:
        for side, paths in zip(_SIDES, (before, after), strict=True):
            images[f"clip_{side}"] = scorer(paths, [case.prompt for case in cases]).numpy()
            images.loc[images["prompt"] == "", f"clip_{side}"] = float("nan")
            columns[f"clip_{side}"] = (f"clip_{side}", "mean")
    table = images.groupby("prompt", sort=False).agg(**columns).reset_index()
    table.insert(0, "group", [group for group, _ in chosen])
    return table


def _grid(chosen: Sequence[tuple[str, str]], cases: Sequence[PromptCase], folder: Path) -> Image.Image:
    """Return a grid with a row for each prompt and a column for each side, with a few small images in each cell."""
    rows = []
    for group, prompt in chosen:
        own = [case for case in cases if case.prompt == prompt][:_IN_CELL]
        cells = [[_small(path) for path in _paths(own, folder / side)] for side in _SIDES]
        rows.append((f"{group}: {prompt or EMPTY_PROMPT_LABEL}", cells))
    return image_grid(rows, _SIDES)


def _small(path: Path) -> Image.Image:
    """Return an image scaled down to what a cell holds."""
    image = open_image(path)
    image.thumbnail((_CELL_SIZE, _CELL_SIZE))
    return image
