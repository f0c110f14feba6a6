"""The weight files of a model's parts: which are read, what is said where they are not there, and a hub's download."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from huggingface_hub.constants import HF_HUB_OFFLINE
from safetensors import safe_open

from ldm.config.settings import did_you_mean
from ldm.diffusion.components import WHOLE_MODEL, UnusableModelError, read_config

# The beginning of the names of weight files, and whether an index with shards is taken before a single file beside it,
# as diffusers takes it; transformers take the single file.
_FILES: dict[str, tuple[str, bool]] = dict.fromkeys(("unet", "transformer", "vae"), ("diffusion_pytorch_model", True))
_TEXT_FILES = ("model", False)


def weight_files(folder: Path, variant: str | None = None) -> tuple[list[Path], str | None]:
    """Return the weight files of the part in `folder`, and its variant: `variant`, or None where it has no such files.

    Raises UnusableModelError, naming the variants that are there, when there are no files or a shard is missing.
    """
    for own in (variant, None):
        files = _files_of(folder, own)
        if files:
            return files, own
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    variants = variants_of(folder)
    pickled = [name for name in names if name.endswith((".bin", ".pt", ".ckpt"))]
    if variants:
        advice = f"there are files of the variant {', '.join(variants)}: give `variant` {' or '.join(variants)}"
    elif pickled:
        advice = (
            f"{pickled[0]} is pickled, which is not read: convert the `model` with diffusers, by "
            "save_pretrained(safe_serialization=True)"
        )
    else:
        advice = WHOLE_MODEL
    raise UnusableModelError(f"{folder} has no weights in safetensors: {advice}")


def variants_of(folder: Path) -> list[str]:
    """Return the variants, such as fp16, that a part has weights of."""
    stem, _ = _FILES.get(folder.name, _TEXT_FILES)
    single = re.compile(rf"{stem}\.(\w+)\.safetensors")
    index = re.compile(rf"{stem}\.safetensors\.index\.(\w+)\.json")
    found = set()
    for path in folder.iterdir() if folder.is_dir() else ():
        match = single.fullmatch(path.name) or index.fullmatch(path.name)
        if match:
            found.add(match[1])
    return sorted(found)


def _files_of(folder: Path, variant: str | None) -> list[Path]:
    stem, prefers_index = _FILES.get(folder.name, _TEXT_FILES)
    infix = f".{variant}" if variant else ""
    single = folder / f"{stem}{infix}.safetensors"
    index = folder / f"{stem}.safetensors.index{infix}.json"
    if index.is_file() and (prefers_index or not single.is_file()):
        return _shards(index)
    return [single] if single.is_file() else []


def _shards(index: Path) -> list[Path]:
    weight_map = read_config(index).get("weight_map")
    names = set(weight_map.values()) if isinstance(weight_map, dict) else set()
    if not names or not all(isinstance(name, str) and Path(name).name == name for name in names):
        raise UnusableModelError(f"{index}: its weight_map names no files beside it: get the model again")
    files = [index.parent / name for name in sorted(names)]
    for path in files:
        if not path.is_file():
            raise UnusableModelError(f"{path}, which {index.name} names, is missing: {WHOLE_MODEL}")
    return files


def read_tensors(files: list[Path]) -> dict[str, torch.Tensor]:
    """Return the tensors of safetensors files in float32, read one by one.

    Mapped from a file, as diffusers reads it, a model would stay in memory twice until wholly rounded or laid out anew.
    """
    tensors: dict[str, torch.Tensor] = {}
    for path in files:
        with safe_open(path, framework="pt", backend="pread") as opened:
            for name in opened.keys():  # noqa: SIM118  # it is no mapping
                tensors[name] = opened.get_tensor(name).float()
    return tensors


def map_tensors(files: list[Path]) -> dict[str, torch.Tensor]:
    """Return the tensors of safetensors files in their own dtype, mapped from the files.

    The system reads a page when it is needed and may let it go again, so that a model may be larger than the memory.
    What has one byte a number comes in float32.
    """
    tensors: dict[str, torch.Tensor] = {}
    for path in files:
        with safe_open(path, framework="pt") as opened:
            tensors |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  # it is no mapping
    return {name: each.float() if each.itemsize == 1 else each for name, each in tensors.items()}


def file_states(files: Iterable[Path]) -> dict[Path, tuple[int, int, int]]:
    """Return what tells each file from another one at its path, or from itself once it is changed."""
    found = {path: path.stat() for path in files if path.is_file()}
    return {path: (state.st_ino, state.st_size, state.st_mtime_ns) for path, state in found.items()}


def download(source: str, variant: str | None) -> Path:
    """Return the folder of a hub's model. Raises UnusableModelError for what is a path, or cannot be reached."""
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", source) or Path(source).parent.is_dir():
        near = did_you_mean(Path(source).name, _folders_beside(Path(source)))
        raise UnusableModelError(
            f"there is no model at {source}: give `model` the path of a diffusers folder, or a hub id such as "
            f"CompVis/stable-diffusion-v1-4{near}"
        )
    try:
        return Path(DiffusionPipeline.download(source, use_safetensors=True, variant=variant))
    except (OSError, ValueError) as error:
        reason = "HF_HUB_OFFLINE is set" if HF_HUB_OFFLINE else " ".join(str(error).split())[:300]
        raise UnusableModelError(
            f"'{source}' is neither a folder here nor a model of the hub that can be reached: give `model` the path of "
            f"a diffusers folder, or see to the network: {reason}"
        ) from error


def _folders_beside(path: Path) -> list[str]:
    try:
        return [sibling.name for sibling in path.parent.iterdir() if sibling.is_dir()]
    except OSError:  # of a folder that is not there either
        return []
