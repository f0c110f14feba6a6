"""Image files: as tensors, in folders, by case number."""

from __future__ import annotations

import json
import os
import re
import struct
import warnings
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from ldm.io.errors import MissingFileError
from ldm.io.files import atomic_write
from ldm.io.png import check_png

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
MAX_PIXELS = 64_000_000  # of an image that is opened: more than a camera's, and 0.2 GB in 8 bit
MAX_BATCH_PIXELS = 2**23  # of all images that a network sees at once, 32 of 512 x 512: LPIPS takes 2.5 GB for them
_ORIGIN_KEY = "srs-me"  # of a PNG's text that says where it comes from
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP")  # and none that would run another program, as PostScript does
_UNREADABLE = (
    UnidentifiedImageError,
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    LookupError,
    struct.error,
    zlib.error,
)


def image_to_tensor(image: Image.Image) -> torch.Tensor:
    """An RGB image as (3, H, W) float32 in [-1, 1]."""
    pixels = np.array(image.convert("RGB"), dtype=np.float32)  # (H, W, 3)
    return torch.from_numpy(pixels).permute(2, 0, 1).div_(127.5).sub_(1)


def tensor_to_images(tensor: torch.Tensor) -> list[Image.Image]:
    """(N, 3, H, W) in [-1, 1] as N images; values outside are clipped. Raises ValueError for NaN and infinity."""
    if not tensor.isfinite().all():
        raise ValueError("an image holds NaN or infinity: choose a smaller `guidance_scale`, or float32")
    pixels = ((tensor.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return [Image.fromarray(array) for array in pixels.permute(0, 2, 3, 1).cpu().numpy()]


def open_image(path: Path, size: int | None = None) -> Image.Image:
    """The image at `path` as RGB, its shorter side scaled to `size` and its middle cut square if `size` is given.

    It is what a viewer shows: turned as its EXIF orientation says, what is transparent over white, and 16 bits a
    channel by their upper eight.

    Raises ValueError, naming the file, when it cannot be read, has more than `MAX_PIXELS`, or several frames.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)  # which ends in the line below
            opened = Image.open(path, formats=_FORMATS)
        with opened:
            reason = _why_refused(opened)
            if opened.format == "PNG" and not reason:
                check_png(path, opened)
            image = None if reason else _as_shown(opened)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise ValueError(f"the image {path} {_too_large()}") from error
    except _UNREADABLE as error:
        raise ValueError(f"cannot read the image {path} as PNG, JPEG, WebP or BMP: remove or replace it") from error
    if image is None:
        raise ValueError(f"the image {path} {reason}")
    if size is not None and image.size != (size, size):
        scale = size / min(image.size)
        sides = [max(size, round(side * scale)) for side in image.size]
        if sides[0] * sides[1] > MAX_PIXELS:
            raise ValueError(f"the image {path} is {image.width} x {image.height} pixels, too narrow to scale: cut it")
        image = image.resize(sides, Image.Resampling.BICUBIC)
        left, top = (image.width - size) // 2, (image.height - size) // 2
        image = image.crop((left, top, left + size, top + size))
    return image


def _too_large() -> str:
    return f"has more than {MAX_PIXELS // 10**6} million pixels: scale it down"


def _why_refused(image: Image.Image) -> str | None:
    """Return why an image that is opened, and not decoded yet, is refused; None where it is not."""
    if image.width * image.height > MAX_PIXELS:
        return _too_large()
    # A camera's MPO is a JPEG with further images behind its own, such as a small one to show in a list.
    if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":
        return "has several frames: save the one that is meant"
    return None


def _as_shown(image: Image.Image) -> Image.Image:
    """Return an opened image as RGB in 8 bits: turned upright, and over white where it is transparent."""
    ImageOps.exif_transpose(image, in_place=True)
    transparency = image.info.get("transparency")
    if image.mode.startswith("I"):  # 16 bits of grey, which some versions of PIL hold in 32
        grey = np.asarray(image)  # (H, W)
        shown = (grey >> 8).astype(np.uint8)
        if transparency is not None:
            shown[grey == transparency] = 255
        return Image.fromarray(shown).convert("RGB")
    if isinstance(transparency, tuple) and max(transparency) > 255:
        raise ValueError("a transparent color of 16 bits in an image that was read in 8")
    if not image.has_transparency_data:
        return image.convert("RGB")
    colors = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", colors.size, "white"), colors).convert("RGB")


def load_batch(paths: Sequence[Path], size: int | None = None) -> torch.Tensor:
    """Images at `paths` as one (N, 3, H, W) tensor in [-1, 1]. Raises ValueError when they differ in size."""
    images = [image_to_tensor(open_image(path, size)) for path in paths]
    for path, image in zip(paths, images, strict=True):
        if image.shape != images[0].shape:
            raise ValueError(_different_sizes(paths[0], path))
    return torch.stack(images)


def load_batches(paths: Sequence[Path], batch_size: int, size: int | None = None) -> Iterator[torch.Tensor]:
    """Yield images at `paths` as (n, 3, H, W) tensors in [-1, 1], `batch_size` at a time, fewer where they are large.

    Raises ValueError when any two differ in size, or one alone has more than `MAX_BATCH_PIXELS`.
    """
    if not paths:
        return
    width, height = open_image(paths[0], size).size
    if width * height > MAX_BATCH_PIXELS:
        raise ValueError(
            f"{paths[0]} is {width} x {height} pixels, too large for a network, which takes {MAX_BATCH_PIXELS} pixels: "
            "scale all images down"
        )
    batch_size = max(1, min(batch_size, MAX_BATCH_PIXELS // (width * height)))
    for start in range(0, len(paths), batch_size):
        images = load_batch(paths[start : start + batch_size], size)
        if images.shape[2:] != (height, width):
            raise ValueError(_different_sizes(paths[0], paths[start]))
        yield images


def check_same_size(first: Path, second: Path) -> None:
    """Raise ValueError when two images differ in size."""
    if open_image(first).size != open_image(second).size:
        raise ValueError(_different_sizes(first, second))


def _different_sizes(first: Path, second: Path) -> str:
    return f"{first} and {second} differ in size: generate both by the same model"


def _natural_key(path: Path) -> list[str | int]:
    pieces: list[str | int] = [*re.split(r"([0-9]+)", str(path))]
    pieces[1::2] = map(int, pieces[1::2])
    return pieces


def is_image(path: str | Path) -> bool:
    """Whether the name is that of an image, and not of one that a killed run left half written."""
    return Path(path).suffix.lower() in IMAGE_SUFFIXES and not Path(path).name.startswith(".")


def list_images(folder: Path, missing: str = "generated images", **details: object) -> list[Path]:
    """Return what `find_images` does. Raises MissingFileError of kind `missing`, with `details`, if that is none."""
    found = find_images(folder)
    if not found:
        what = "no images in" if Path(folder).is_dir() else "no folder"
        raise MissingFileError(f"{what} {folder}", missing, **details)
    return found


def find_images(folder: Path) -> list[Path]:
    """Return all images below `folder`, in natural order (2 before 10).

    Hidden files and folders are left out. Links to files and folders count like what they lead to, each file once; a
    link to a folder that `folder` is in leads nowhere new.
    """
    found: dict[str, Path] = {}  # by where it lies
    for path in _visible_files(Path(folder)):
        if is_image(path):
            found.setdefault(os.path.realpath(path), path)
    return sorted(found.values(), key=_natural_key)


def _visible_files(folder: Path) -> Iterator[Path]:
    """Yield the files below a folder that are not hidden, those that are links or below one last."""
    root = folder.resolve()
    seen = {str(root), *map(str, root.parents)}
    folders, linked_folders, linked_files = [folder] if folder.is_dir() else [], [], []
    while folders or linked_folders:
        if folders:
            current = folders.pop()
        else:
            current = linked_folders.pop(0)
            if os.path.realpath(current) in seen:
                continue
        seen.add(os.path.realpath(current))
        for path in sorted(current.iterdir()):
            if path.name.startswith("."):
                continue
            if path.is_dir():
                (linked_folders if path.is_symlink() else folders).append(path)
            elif path.is_symlink():
                linked_files.append(path)
            elif path.is_file():
                yield path
    yield from linked_files


def image_filename(case: int, sample: int) -> str:
    """The file name of a case's n-th image, as in the original repository."""
    return f"{case}_{sample}.png"


def parse_case_number(path: Path) -> int:
    """The case number in an image's file name. Raises ValueError when the name has none."""
    head = Path(path).stem.split("_")[0]
    if not re.fullmatch("[0-9]+", head):
        raise ValueError(f"{path}: an image's name starts with its case number, such as 12_0.png")
    return int(head)


def save_image(path: Path, image: Image.Image, origin: Mapping[str, Any] | None = None) -> None:
    """Write an image, whole or not at all; a PNG says in a text of its own where it comes from, its `origin`."""
    with atomic_write(path) as partial:
        if origin is None:
            image.save(partial)
            return
        information = PngInfo()
        information.add_text(_ORIGIN_KEY, json.dumps(origin, sort_keys=True))
        image.save(partial, pnginfo=information)


def read_origin(path: Path) -> dict[str, Any] | None:
    """Return what `save_image` wrote into a PNG about its origin; None for an image that says nothing of it."""
    try:
        with Image.open(path, formats=_FORMATS) as opened:
            origin = json.loads(opened.info.get(_ORIGIN_KEY, "null"))
    except (*_UNREADABLE, RecursionError, TypeError):
        return None
    return origin if isinstance(origin, dict) else None


def is_intact(path: Path) -> bool:
    """Return whether a PNG file is whole, by the checksums in it."""
    try:
        with Image.open(path, formats=_FORMATS) as opened:
            check_png(path, opened)
        with Image.open(path, formats=_FORMATS) as opened:
            opened.verify()
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError):
        return False
    return True
