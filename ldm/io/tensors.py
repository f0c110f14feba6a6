"""TODO io.tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
import hashlib
from importlib.metadata import version
import json
from pathlib import Path
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
import torch
from ldm.io.files import atomic_write


METADATA_KEY = "srs-me"


def library_versions() -> dict[str, str]:
    """The libraries that a recipe names."""
    return {name: version(name) for name in ("torch", "diffusers", "transformers")}


def save_tensors(path: Path, tensors: Mapping[str, torch.Tensor], kind: str, recipe: dict) -> None:
    """Write safetensors whose header says what the file is (`kind`) and what made it (`recipe`); the same bytes for the
    same content, since all of that is one entry (several would be written in random order)."""
    header = json.dumps({"kind": kind, "recipe": recipe}, sort_keys=True)
    with atomic_write(Path(path)) as partial:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, partial,
                  metadata={METADATA_KEY: header})


@dataclass(frozen=True)
class LazyTensors(Mapping[str, torch.Tensor]):
    """Tensors of a safetensors file by other names (`names`: name -> that in the file), each read when it is asked for, so that
    many files together take little memory."""

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
        return LazyTensors(self.path, {name.removeprefix(prefix): own for name, own in self.names.items() if name.startswith(prefix)})


def load_tensors(path: Path, kind: str, hint: str = "") -> tuple[LazyTensors, dict]:
    """Tensors, each read when it is asked for, and recipe of a file that `save_tensors` wrote as `kind`.

    Raises ValueError when it is missing (`hint` says what makes it), foreign, damaged, or holds NaN or infinity.
    """
    names, recipe = _read_header(path, kind, hint)
    tensors = LazyTensors(Path(path), {name: name for name in names})
    try:
        for name, tensor in tensors.items():
            if tensor.is_floating_point() and not tensor.isfinite().all():
                raise ValueError(f"{path}: {name} holds NaN or infinity: make the file again")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged or not safetensors: make it again") from error
    return tensors, recipe


def _read_header(path: Path, kind: str, hint: str) -> tuple[list[str], dict]:
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"no {kind} {path}" + (f": {hint}" if hint else ""))
    try:
        with safe_open(path, framework="pt") as opened:
            header, names = json.loads((opened.metadata() or {}).get(METADATA_KEY, "{}")), list(opened.keys())
    except (SafetensorError, json.JSONDecodeError, OSError) as error:
        raise ValueError(f"{path} is damaged or not safetensors: make it again") from error
    if not isinstance(header, dict) or header.get("kind") != kind or not isinstance(header.get("recipe"), dict):
        what = header.get("kind", "foreign file") if isinstance(header, dict) else "foreign file"
        raise ValueError(f"{path} is not a {kind} but a {what}" + (f": {hint}" if hint else ""))
    return names, header["recipe"]


def read_metadata(path: Path, kind: str) -> dict:
    """The recipe of a file that `save_tensors` wrote as `kind`; empty when there is no such file or it is damaged."""
    try:
        return _read_header(path, kind, "")[1]
    except ValueError:
        return {}


def check_base_model(recipe: Mapping, digest: str, path: Path | str) -> None:
    """Raises ValueError unless a file's recipe says that it was made for the base model with that digest."""
    if recipe.get("base_digest") != digest:
        raise ValueError(f"{path} was made for another base model ({recipe.get('base', 'unknown')}, digest "
                         f"{str(recipe.get('base_digest'))[:12]}, not {digest[:12]}): pass --model that one, or make it again")


def tensor_digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 over names, shapes and values in half precision, so that a model and its fp16 copy are one base."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu()
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(tensor.to(torch.float16).contiguous().numpy().tobytes())
    return digest.hexdigest()
