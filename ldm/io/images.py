"""Image files: as tensors, in folders, by case number."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from ldm.io.errors import MissingFileError
from ldm.io.files import atomic_write

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}


def image_to_tensor(image: Image.Image) -> torch.Tensor:
    """An RGB image as (3, H, W) float32 in [-1, 1]."""
    return torch.from_numpy(np.asarray(image.convert("RGB"), dtype=np.float32)).permute(2, 0, 1) / 127.5 - 1


def tensor_to_images(tensor: torch.Tensor) -> list[Image.Image]:
    """(N, 3, H, W) in [-1, 1] as N images; values outside are clipped."""
    pixels = ((tensor.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return [Image.fromarray(array) for array in pixels.permute(0, 2, 3, 1).cpu().numpy()]


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
    images = [image_to_tensor(open_image(path, size)) for path in paths]
    mismatched = [path for path, image in zip(paths, images) if image.shape != images[0].shape]
    if mismatched:
        raise ValueError(f"{paths[0]} and {mismatched[0]} differ in size: generate both by the same model")
    return torch.stack(images)


def _natural_key(path: Path) -> list:
    return [int(piece) if piece.isdigit() else piece for piece in re.split(r"(\d+)", str(path))]


def is_image(path: str | Path) -> bool:
    """Whether the name is that of an image, and not of one that a killed run left half written."""
    return Path(path).suffix.lower() in IMAGE_SUFFIXES and not Path(path).name.startswith(".")


def list_images(folder: Path, missing: str = "generated images", **details: object) -> list[Path]:
    """Return all images below `folder`, in natural order (2 before 10).

    Raises MissingFileError of kind `missing`, with `details`, when there are none.
    """
    folder = Path(folder)
    paths = [path for path in folder.rglob("*") if is_image(path)]
    if not paths:
        what = "no images in" if folder.is_dir() else "no folder"
        raise MissingFileError(f"{what} {folder}", missing, **details)
    return sorted(paths, key=_natural_key)


def image_filename(case: int, sample: int) -> str:
    """The file name of a case's n-th image, as in the original repository."""
    return f"{case}_{sample}.png"


def parse_case_number(path: Path) -> int:
    """The case number in an image's file name. Raises ValueError when the name has none."""
    head = Path(path).stem.split("_")[0]
    if not head.isdigit():
        raise ValueError(f"{path}: an image's name starts with its case number, such as 12_0.png")
    return int(head)


def save_image(path: Path, image: Image.Image) -> None:
    """Write an image, whole or not at all."""
    with atomic_write(path) as partial:
        image.save(partial)
