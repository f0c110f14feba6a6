"""Files with tensors, opened without ever running code from them, and their digests."""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ldm.images import atomic

HEADER = "srs-me"


def versions() -> dict[str, str]:
    """The libraries that a recipe names."""
    return {name: version(name) for name in ("torch", "diffusers", "transformers")}


def save_tensors(path: Path, tensors: Mapping[str, torch.Tensor], kind: str, recipe: dict) -> None:
    """Write safetensors whose header says what the file is (`kind`) and what made it (`recipe`); the same bytes for the
    same content, since all of that is one entry (several would be written in random order)."""
    header = json.dumps({"kind": kind, "recipe": recipe}, sort_keys=True)
    with atomic(Path(path)) as partial:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, partial,
                  metadata={HEADER: header})


def load_tensors(path: Path, kind: str, hint: str = "") -> tuple[dict[str, torch.Tensor], dict]:
    """Tensors and recipe of a file that `save_tensors` wrote as `kind`.

    Raises ValueError when it is missing (`hint` says what makes it), foreign, damaged, or holds NaN or infinity.
    """
    tensors, recipe = _read(path, kind, hint, tensors=True)
    bad = [name for name, tensor in tensors.items() if tensor.is_floating_point() and not tensor.isfinite().all()]
    if bad:
        raise ValueError(f"{path}: {bad[0]} holds NaN or infinity: make the file again")
    return tensors, recipe


def _read(path: Path, kind: str, hint: str, tensors: bool) -> tuple[dict[str, torch.Tensor], dict]:
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"no {kind} {path}" + (f": {hint}" if hint else ""))
    try:
        with safe_open(path, framework="pt") as opened:
            header = json.loads((opened.metadata() or {}).get(HEADER, "{}"))
            found = {name: opened.get_tensor(name) for name in opened.keys()} if tensors else {}
    except (SafetensorError, json.JSONDecodeError, OSError) as error:
        raise ValueError(f"{path} is damaged or not safetensors: make it again") from error
    if not isinstance(header, dict) or header.get("kind") != kind or not isinstance(header.get("recipe"), dict):
        what = header.get("kind", "foreign file") if isinstance(header, dict) else "foreign file"
        raise ValueError(f"{path} is not a {kind} but a {what}" + (f": {hint}" if hint else ""))
    return found, header["recipe"]


def recipe_of(path: Path, kind: str) -> dict:
    """The recipe of a file that `save_tensors` wrote as `kind`; empty when there is no such file or it is damaged."""
    try:
        return _read(path, kind, "", tensors=False)[1]
    except ValueError:
        return {}


def tensor_digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 over names, shapes and values in half precision, so that a model and its fp16 copy are one base."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu()
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(tensor.to(torch.float16).contiguous().numpy().tobytes())
    return digest.hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 of a file, or of all files of a folder with their relative names."""
    path, digest = Path(path), hashlib.sha256()
    for part in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if part.is_file():
            digest.update(part.relative_to(path).as_posix().encode())
            with open(part, "rb") as opened:
                digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()


class _ArraysOnly(pickle.Unpickler):
    """An unpickler that knows what a numpy array is made of and refuses everything else."""

    _ALLOWED = {("numpy", "ndarray"): np.ndarray, ("numpy", "dtype"): np.dtype}
    _REBUILD = {("numpy.core.multiarray", "_reconstruct"), ("numpy._core.multiarray", "_reconstruct")}

    def find_class(self, module: str, name: str):
        if (module, name) in self._REBUILD:
            return np._core.multiarray._reconstruct
        if (module, name) in self._ALLOWED:
            return self._ALLOWED[module, name]
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def read_array_pickle(path: Path):
    """A pickle of nothing but numpy arrays in plain containers. Raises ValueError when it holds anything else."""
    try:
        with open(path, "rb") as opened:
            return _ArraysOnly(opened).load()
    except (pickle.UnpicklingError, EOFError, AttributeError, IndexError, TypeError) as error:
        raise ValueError(f"{path} is not a pickle of numpy arrays alone and was not loaded: {error}") from error
