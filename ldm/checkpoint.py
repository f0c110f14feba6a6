"""Files with tensors, opened without ever running code from them, and their digests."""

from __future__ import annotations

import hashlib
import json
import pickle
import re
import warnings
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from ldm.images import atomic

HEADER = "srs-me"
CHECKPOINTS = {".ckpt", ".pt", ".safetensors"}
UNET, VAE, TEXT, EMA = "model.diffusion_model.", "first_stage_model.", "cond_stage_model.transformer.", "model_ema."
_CALLBACKS = [f"{library}.callbacks.{name}" for library in ("pytorch_lightning", "lightning.pytorch")
              for name in ("model_checkpoint.ModelCheckpoint", "early_stopping.EarlyStopping")]


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


@dataclass(frozen=True)
class StoredTensors(Mapping[str, torch.Tensor]):
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

    def under(self, prefix: str) -> StoredTensors:
        """Those whose names start with `prefix`, without it."""
        return StoredTensors(self.path, {name.removeprefix(prefix): own for name, own in self.names.items() if name.startswith(prefix)})


def load_tensors(path: Path, kind: str, hint: str = "") -> tuple[StoredTensors, dict]:
    """Tensors, each read when it is asked for, and recipe of a file that `save_tensors` wrote as `kind`.

    Raises ValueError when it is missing (`hint` says what makes it), foreign, damaged, or holds NaN or infinity.
    """
    names, recipe = _read(path, kind, hint)
    tensors = StoredTensors(Path(path), {name: name for name in names})
    try:
        for name, tensor in tensors.items():
            if tensor.is_floating_point() and not tensor.isfinite().all():
                raise ValueError(f"{path}: {name} holds NaN or infinity: make the file again")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged or not safetensors: make it again") from error
    return tensors, recipe


def _read(path: Path, kind: str, hint: str) -> tuple[list[str], dict]:
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"no {kind} {path}" + (f": {hint}" if hint else ""))
    try:
        with safe_open(path, framework="pt") as opened:
            header, names = json.loads((opened.metadata() or {}).get(HEADER, "{}")), list(opened.keys())
    except (SafetensorError, json.JSONDecodeError, OSError) as error:
        raise ValueError(f"{path} is damaged or not safetensors: make it again") from error
    if not isinstance(header, dict) or header.get("kind") != kind or not isinstance(header.get("recipe"), dict):
        what = header.get("kind", "foreign file") if isinstance(header, dict) else "foreign file"
        raise ValueError(f"{path} is not a {kind} but a {what}" + (f": {hint}" if hint else ""))
    return names, header["recipe"]


def recipe_of(path: Path, kind: str) -> dict:
    """The recipe of a file that `save_tensors` wrote as `kind`; empty when there is no such file or it is damaged."""
    try:
        return _read(path, kind, "")[1]
    except ValueError:
        return {}


def check_base(recipe: Mapping, digest: str, path: Path | str) -> None:
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


def file_digest(path: Path) -> str:
    """SHA-256 of a file, or of all files of a folder with their relative names."""
    path, digest = Path(path), hashlib.sha256()
    for part in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if part.is_file():
            digest.update(part.relative_to(path).as_posix().encode())
            with open(part, "rb") as opened:
                digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()


class _Ignored:
    """What stands where a checkpoint names one of Lightning's callbacks: it does nothing and keeps nothing."""


@contextmanager
def callbacks_ignored() -> Iterator[None]:
    """While the block runs, `torch.load(weights_only=True)` takes `_Ignored` for the callbacks that the original Stable
    Diffusion checkpoints name, and runs none of their code."""
    with torch.serialization.safe_globals([(_Ignored, name) for name in _CALLBACKS]):
        yield


def open_checkpoint(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a CompVis checkpoint, .ckpt or .safetensors, mapped from the file where its format allows.

    Raises ValueError when it is missing, damaged, or a pickle that would run code, none of which is run.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"no checkpoint {path}: pass --ckpt_path the path of a .ckpt or .safetensors file")
    try:
        if path.suffix == ".safetensors":
            content = load_file(path)
        else:
            with callbacks_ignored(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                content = torch.load(path, map_location=torch.get_default_device(), weights_only=True, mmap=zipfile.is_zipfile(path))
    except (SafetensorError, pickle.UnpicklingError, zipfile.BadZipFile, RuntimeError, OSError, EOFError, ValueError, LookupError,
            AttributeError, TypeError) as error:
        asked = re.search(r"GLOBAL (\S+)", str(error))
        why = f"it asks to run {asked[1]}" if asked else "it is damaged or not a checkpoint"
        raise ValueError(f"{path} was not loaded: {why}; get it again from where it is published, as .safetensors") from error
    while isinstance(content, Mapping) and "state_dict" in content:
        content = content["state_dict"]
    tensors = {name: value for name, value in content.items() if isinstance(value, torch.Tensor)} \
        if isinstance(content, Mapping) else {}
    if not any(str(name).startswith(UNET) for name in tensors):
        raise ValueError(f"{path} holds no U-Net in CompVis' layout ({UNET}...): pass --ckpt_path a whole Stable Diffusion "
                         "checkpoint, or --model a diffusers folder")
    return tensors


_UNET_STEMS = {"time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
               "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2",
               "mid_block.resnets.0": "middle_block.0", "mid_block.attentions.0": "middle_block.1",
               "mid_block.resnets.1": "middle_block.2"}
_UNET_RESNET = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
                "conv2": "out_layers.3", "conv_shortcut": "skip_connection"}
_VAE_PARTS = {"mid_block.resnets.0": "mid.block_1", "mid_block.resnets.1": "mid.block_2", "mid_block.attentions.0": "mid.attn_1",
              "conv_norm_out": "norm_out", "conv_shortcut": "nin_shortcut", "downsamplers.0": "downsample",
              "upsamplers.0": "upsample", "group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def unet_to_compvis(names: Iterable[str]) -> dict[str, str]:
    """Every U-Net parameter's name in diffusers' layout -> in CompVis'. The way back is diffusers' own conversion."""
    names = list(names)
    layers = 1 + max(int(found[1]) for found in (re.match(r"down_blocks\.0\.resnets\.(\d+)", name) for name in names) if found)
    attended = {found[1] for found in (re.match(r"(up_blocks\.\d+)\.attentions", name) for name in names) if found}

    def renamed(name: str) -> str:
        for stem, other in _UNET_STEMS.items():
            if name.startswith(stem + "."):
                return inner(other, name.removeprefix(stem + "."), "resnets" in stem)
        side, block, part, n, rest = re.match(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.*)", name).groups()
        first = int(block) * (layers + 1)
        if part == "downsamplers":
            return f"input_blocks.{first + layers + 1}.0.op.{rest.removeprefix('conv.')}"
        if part == "upsamplers":
            return f"output_blocks.{first + layers}.{2 if f'up_blocks.{block}' in attended else 1}.{rest}"
        number = first + int(n) + (side == "down")
        stem = f"{'input' if side == 'down' else 'output'}_blocks.{number}.{int(part == 'attentions')}"
        return inner(stem, rest, part == "resnets")

    def inner(stem: str, rest: str, resnet: bool) -> str:
        head, _, tail = rest.partition(".")
        return f"{stem}.{_UNET_RESNET[head]}.{tail}" if resnet else f"{stem}.{rest}"

    return {name: UNET + renamed(name) for name in names}


def to_compvis(unet: Mapping[str, torch.Tensor], vae: Mapping[str, torch.Tensor],
               text_encoder: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The state dicts of a Stable Diffusion v1 in diffusers' layout as one of CompVis' checkpoints: the same values."""
    blocks = 1 + max(int(found[1]) for found in (re.match(r"decoder\.up_blocks\.(\d+)", name) for name in vae) if found)
    names = unet_to_compvis(unet)
    tensors = {names[name]: tensor for name, tensor in unet.items()}
    for name, tensor in vae.items():
        if ".attentions." in name and tensor.dim() == 2:
            tensor = tensor[:, :, None, None]  # CompVis' attention is made of 1x1 convolutions
        for part, other in _VAE_PARTS.items():
            name = re.sub(rf"(^|\.){re.escape(part)}\.", rf"\g<1>{other}.", name)
        name = re.sub(r"down_blocks\.(\d+)\.resnets", r"down.\1.block", name).replace("down_blocks", "down")
        name = re.sub(r"up_blocks\.(\d+)", lambda found: f"up.{blocks - 1 - int(found[1])}", name).replace("resnets", "block")
        tensors[VAE + name] = tensor
    for name, tensor in text_encoder.items():
        tensors[f"{TEXT}text_model.{name.removeprefix('text_model.')}"] = tensor
    return tensors


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
