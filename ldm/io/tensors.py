"""Tensors in safetensors files whose header says what they are, opened without running code, and their digests."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ldm.io.files import atomic_write
from ldm.io.legacy import upgrade

METADATA_KEY = "srs-me"
CREATED_BY = "srs-me"  # the program, in metadata


def library_versions() -> dict[str, str]:
    """Return the versions of the libraries that metadata names."""
    return {name: version(name) for name in ("torch", "diffusers", "transformers")}


def save_tensors(path: Path, tensors: Mapping[str, torch.Tensor], file_type: str, metadata: dict[str, Any]) -> None:
    """Write safetensors whose header says what the file is (`file_type`) and what made it (`metadata`).

    The same content gives the same bytes: all of the header is one entry, as several would be written in random order.
    """
    header = json.dumps({"file_type": file_type, "metadata": metadata}, sort_keys=True)
    with atomic_write(Path(path)) as partial:
        contents = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        save_file(contents, partial, metadata={METADATA_KEY: header})


@dataclass(frozen=True)
class LazyTensors(Mapping[str, torch.Tensor]):
    """Tensors of a safetensors file by other names (`names`: name -> that in the file), each read when it is asked for,
    so that many files together take little memory.
    """

    path: Path
    names: Mapping[str, str]

    def __getitem__(self, name: str) -> torch.Tensor:
        with safe_open(self.path, framework="pt", backend="pread") as opened:
            return opened.get_tensor(self.names[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def with_prefix(self, prefix: str) -> LazyTensors:
        """Those whose names start with `prefix`, without it."""
        return LazyTensors(
            self.path, {name.removeprefix(prefix): own for name, own in self.names.items() if name.startswith(prefix)}
        )


def load_tensors(path: Path, file_type: str, hint: str = "") -> tuple[LazyTensors, dict[str, Any]]:
    """Return the tensors, each read when it is asked for, and the metadata of a file that `save_tensors` wrote.

    Raises ValueError if it is missing (`hint`: what to give instead), of another type, damaged, or has NaN or infinity.
    """
    names, metadata = _read_header(path, file_type, hint)
    tensors = LazyTensors(Path(path), {name: name for name in names})
    try:
        for name, tensor in tensors.items():
            if tensor.is_floating_point() and not tensor.isfinite().all():
                raise ValueError(f"{path}: {name} holds NaN or infinity: make the file again")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged or not safetensors: make it again") from error
    return tensors, metadata


def _read_header(path: Path, file_type: str, hint: str) -> tuple[list[str], dict[str, Any]]:
    path = Path(path)
    advice = f": {hint}" if hint else ""
    if not path.is_file():
        raise ValueError(f"no {file_type} {path}{advice}")
    try:
        with safe_open(path, framework="pt") as opened:
            header = upgrade(json.loads((opened.metadata() or {}).get(METADATA_KEY, "{}")))
            names = list(opened.keys())
    except (SafetensorError, json.JSONDecodeError, OSError) as error:
        raise ValueError(f"{path} is damaged or not safetensors: make it again") from error
    header = header if isinstance(header, dict) else {}
    if header.get("file_type") != file_type or not isinstance(header.get("metadata"), dict):
        raise ValueError(
            f"{path} is not a {file_type} but a {header.get('file_type', 'file of another program')}{advice}"
        )
    return names, header["metadata"]


def read_metadata(path: Path, file_type: str) -> dict[str, Any]:
    """Return the metadata of a file that `save_tensors` wrote; empty when there is no such file or it is damaged."""
    try:
        return _read_header(path, file_type, "")[1]
    except ValueError:
        return {}


def check_base_model(metadata: Mapping[str, Any], digest: str, path: Path | str) -> None:
    """Raise ValueError unless a file's metadata says that it was made for the base model with that digest."""
    made_for = metadata.get("base_digest")
    if made_for != digest:
        raise ValueError(
            f"{path} was made for another base model ({metadata.get('base_model', 'unknown')}, digest "
            f"{str(made_for)[:12]}, "
            f"not {digest[:12]}): pass `model` that one, or make it again"
        )


def tensor_digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 over names, shapes and values in half precision, so that a model and its fp16 copy are one base."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu()
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(tensor.to(torch.float16).contiguous().numpy().tobytes())
    return digest.hexdigest()
