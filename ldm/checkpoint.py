"""Files with tensors, opened without ever running code from them, and their digests."""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ldm.images import atomic


def save_tensors(path: Path, tensors: Mapping[str, torch.Tensor], kind: str, recipe: dict) -> None:
    """Write safetensors whose header says what the file is (`kind`) and what made it (`recipe`, as JSON)."""
    with atomic(Path(path)) as partial:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, partial,
                  metadata={"kind": kind, "recipe": json.dumps(recipe)})


def load_tensors(path: Path, kind: str, hint: str = "") -> tuple[dict[str, torch.Tensor], dict]:
    """Tensors and recipe of a file that `save_tensors` wrote as `kind`.

    Raises ValueError when it is missing (`hint` says what makes it), foreign, damaged, or holds NaN or infinity.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"no {kind} {path}" + (f": {hint}" if hint else ""))
    try:
        with safe_open(path, framework="pt") as opened:
            header = opened.metadata() or {}
            if header.get("kind") != kind:
                raise ValueError(f"{path} is not a {kind} but a {header.get('kind', 'foreign file')}"
                                 + (f": {hint}" if hint else ""))
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}
            recipe = json.loads(header["recipe"])
    except (SafetensorError, KeyError, json.JSONDecodeError, OSError) as error:
        raise ValueError(f"{path} is damaged or not safetensors: make it again") from error
    bad = [name for name, tensor in tensors.items() if tensor.is_floating_point() and not tensor.isfinite().all()]
    if bad:
        raise ValueError(f"{path}: {bad[0]} holds NaN or infinity: make the file again")
    return tensors, recipe


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
