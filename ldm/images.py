"""Images and the files around them: tensors, folders, prompt lists, atomic writes, picture sheets."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import torch
from PIL import Image, ImageDraw, ImageFont, UnidentifiedImageError

RECIPE = "recipe.json"  # in a folder: what made it
SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}


def _readable(path: Path) -> None:
    """Give a file the permissions of any new one: tempfile and safetensors make theirs for the owner alone."""
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)


_PARTIAL = ".partial-"  # then the host's name, the writer's process number, and what tells apart


@cache
def _sweep(folder: Path) -> None:
    """Remove what processes of this machine that were killed left half written in `folder`; once for each process."""
    mine = f"{_PARTIAL}{socket.gethostname()}-"
    for left in folder.glob(f"{mine}*"):
        writer = left.name.removeprefix(mine).split("-")[0]
        if writer.isdigit() and not psutil.pid_exists(int(writer)):
            shutil.rmtree(left) if left.is_dir() else left.unlink(missing_ok=True)


def _prepare(path: Path) -> str:
    """Make the folder of `path`, and return how the name of what is half written there begins."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _sweep(path.parent.resolve())
    return f"{_PARTIAL}{socket.gethostname()}-{os.getpid()}-"


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, which becomes `path` when the block ends well and vanishes otherwise; what a killed
    process leaves vanishes when the next one writes there."""
    path = Path(path)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=_prepare(path), suffix=path.suffix)
    os.close(handle)
    partial = Path(name)
    try:
        yield partial
        _readable(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Like `atomic` for a folder, which replaces an older one at `path` only when the block has ended well."""
    path = Path(path)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=_prepare(path)) as partial:
        new, old = Path(partial) / "new", Path(partial) / "old"
        new.mkdir()
        yield new
        for part in new.rglob("*"):
            if part.is_file():
                _readable(part)
        if path.exists():
            path.rename(old)
        new.rename(path)


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path`, whole or not at all."""
    with atomic(path) as partial:
        partial.write_text(text)


def write_json(path: Path, content: dict) -> None:
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def check_recipe(folder: Path, recipe: dict) -> None:
    """Raises ValueError when `folder` holds what another recipe made."""
    path = folder / RECIPE
    if path.exists() and json.loads(path.read_text()) != json.loads(json.dumps(recipe)):
        raise ValueError(f"{folder} holds what another run made (see {path.name} there): "
                         "choose another --save_path, or remove the folder")


def to_tensor(image: Image.Image) -> torch.Tensor:
    """An RGB image as (3, H, W) float32 in [-1, 1]."""
    return torch.from_numpy(np.asarray(image.convert("RGB"), dtype=np.float32)).permute(2, 0, 1) / 127.5 - 1


def to_images(tensor: torch.Tensor) -> list[Image.Image]:
    """(N, 3, H, W) in [-1, 1] as N images; values outside are clipped."""
    pixels = ((tensor.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return [Image.fromarray(one) for one in pixels.permute(0, 2, 3, 1).cpu().numpy()]


def open_image(path: Path, size: int | None = None) -> Image.Image:
    """The image at `path` as RGB, its shorter side scaled to `size` and its middle cut square if `size` is given.

    Raises ValueError, naming the file, when it cannot be read.
    """
    try:
        with Image.open(path) as opened:
            image = opened.convert("RGB")
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise ValueError(f"cannot read the image {path}: remove it or write it again") from error
    if size is not None and image.size != (size, size):
        scale = size / min(image.size)
        image = image.resize([max(size, round(side * scale)) for side in image.size], Image.Resampling.BICUBIC)
        left, top = (image.width - size) // 2, (image.height - size) // 2
        image = image.crop((left, top, left + size, top + size))
    return image


def load_batch(paths: Sequence[Path], size: int | None = None) -> torch.Tensor:
    """Images at `paths` as one (N, 3, H, W) tensor in [-1, 1]. Raises ValueError when they differ in size."""
    images = [to_tensor(open_image(path, size)) for path in paths]
    odd = [path for path, image in zip(paths, images) if image.shape != images[0].shape]
    if odd:
        raise ValueError(f"{paths[0]} and {odd[0]} differ in size: generate both by the same model")
    return torch.stack(images)


def _natural(path: Path) -> list:
    return [int(piece) if piece.isdigit() else piece for piece in re.split(r"(\d+)", str(path))]


def is_image(path: str | Path) -> bool:
    """Whether the name is that of an image, and not of one that a killed run left half written."""
    return Path(path).suffix.lower() in SUFFIXES and not Path(path).name.startswith(".")


def list_images(folder: Path, hint: str = "") -> list[Path]:
    """All images below `folder`, in natural order (2 before 10).

    Raises ValueError when there are none; `hint` then says what to type instead.
    """
    folder = Path(folder)
    found = [path for path in folder.rglob("*") if is_image(path)]
    if not found:
        what = "no images in" if folder.is_dir() else "no folder"
        raise ValueError(f"{what} {folder}" + (f": {hint}" if hint else ""))
    return sorted(found, key=_natural)


@dataclass(frozen=True)
class Case:
    """One row of a prompt list: the prompt, the seed of its first noise, the number in its images' names."""

    prompt: str
    seed: int
    number: int


def read_cases(path: Path) -> list[Case]:
    """A prompt list: a CSV with columns prompt, evaluation_seed, case_number.

    Raises ValueError when the file, a column or a whole number is missing or a case number stands twice.
    """
    try:
        table = pd.read_csv(path, keep_default_na=False, dtype={"prompt": str})
    except FileNotFoundError:
        raise ValueError(f"no prompt list {path}: make one with python eval-scripts/make-prompts.py") from None
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a CSV file with a header line") from error
    missing = [name for name in ("prompt", "evaluation_seed", "case_number") if name not in table.columns]
    if missing:
        raise ValueError(f"{path} lacks the column {', '.join(missing)}: "
                         "a prompt list has prompt,evaluation_seed,case_number")
    for name in ("evaluation_seed", "case_number"):
        numbers = pd.to_numeric(table[name], errors="coerce")
        bad = table.index[numbers.isna() | (numbers < 0) | (numbers % 1 != 0)]
        if len(bad):
            raise ValueError(f"{path} line {bad[0] + 2}: {name} is '{table[name][bad[0]]}', not a whole number from 0")
    if table.case_number.duplicated().any():
        raise ValueError(f"{path}: case_number {table.case_number[table.case_number.duplicated()].iloc[0]} stands twice")
    return [Case(str(row.prompt), int(row.evaluation_seed), int(row.case_number)) for row in table.itertuples()]


def seeded_cases(prompts: Sequence[str], number: int, seed: int) -> list[Case]:
    """`number` cases of each prompt, no evaluation seed twice among them, all drawn from `seed`.

    Raises ValueError for more than 3000 cases in all.
    """
    if len(prompts) * number > 3000:
        raise ValueError(f"{len(prompts)} prompts of {number} seeds each: there are 3000 seeds, so that {3000 // len(prompts)} "
                         "each is the most")
    seeds = np.random.default_rng(seed).choice(3000, size=(len(prompts), number), replace=False)
    return [Case(prompt, int(own), k * number + n) for k, prompt in enumerate(prompts) for n, own in enumerate(seeds[k])]


def write_cases(path: Path, cases: Sequence[Case]) -> None:
    """Write a prompt list that `read_cases` reads."""
    table = pd.DataFrame([(case.prompt, case.seed, case.number) for case in cases],
                         columns=["prompt", "evaluation_seed", "case_number"])
    with atomic(path) as partial:
        table.to_csv(partial, index=False)


def image_name(case: int, sample: int) -> str:
    """The file name of a case's n-th image, as in the original repository."""
    return f"{case}_{sample}.png"


def case_number(path: Path) -> int:
    """The case number in an image's file name. Raises ValueError when the name has none."""
    head = Path(path).stem.split("_")[0]
    if not head.isdigit():
        raise ValueError(f"{path}: an image's name starts with its case number, such as 12_0.png")
    return int(head)


def save_image(path: Path, image: Image.Image) -> None:
    with atomic(path) as partial:
        image.save(partial)


def sheet(rows: Sequence[tuple[str, Sequence[Sequence[Image.Image]]]], columns: Sequence[str], zoom: int = 1,
          frames: Sequence[Sequence[str | None]] = ()) -> Image.Image:
    """A labelled picture sheet: each row is a label and, for every column, a few images side by side.

    A column's title may have several lines, of which the last decides how wide the column must be: those above may stand
    over its neighbours too. `frames` may give the colour of a frame for each cell.
    """
    font, small = ImageFont.load_default(15), ImageFont.load_default(13)
    width, height = (side * zoom for side in rows[0][1][0][0].size)
    gap, left = 6, 20 + max(int(small.getlength(label)) for label, _ in rows)
    top = 11 + 19 * max(title.count("\n") + 1 for title in columns)
    lengths = [max(len(cells[k]) for _, cells in rows) * width for k in range(len(columns))]
    steps = [max(length, int(font.getlength(title.split("\n")[-1]))) for length, title in zip(lengths, columns)]
    starts = [left + sum(steps[:k]) + gap * 3 * k for k in range(len(columns))]
    canvas = Image.new("RGB", (starts[-1] + steps[-1] + gap, top + len(rows) * (height + gap)), "white")
    draw = ImageDraw.Draw(canvas)
    for start, title in zip(starts, columns):
        for n, line in enumerate(reversed(title.split("\n"))):
            draw.text((start, top - 22 - 19 * n), line, fill="black", font=font)
    for k, (label, cells) in enumerate(rows):
        y = top + k * (height + gap)
        draw.text((8, y + height // 2), label, fill="black", font=small, anchor="lm")
        for column, (start, images) in enumerate(zip(starts, cells)):
            for n, image in enumerate(images):
                canvas.paste(image.resize((width, height), Image.Resampling.NEAREST), (start + n * width, y))
            if frames and frames[k][column]:
                box = (start - 3, y - 3, start + len(images) * width + 2, y + height + 2)
                draw.rectangle(box, outline=frames[k][column], width=3)
    return canvas
