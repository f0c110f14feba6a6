"""Stable Diffusion v1 checkpoints in CompVis' layout: opened without running code from them, and written.

From CompVis' layout to diffusers' leads `StableDiffusionPipeline.from_single_file`; here is the way back.
"""

from __future__ import annotations

import pickle
import re
import warnings
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

CHECKPOINT_SUFFIXES = {".ckpt", ".pt", ".safetensors"}

UNET_PREFIX = "model.diffusion_model."
VAE_PREFIX = "first_stage_model."
TEXT_PREFIX = "cond_stage_model.transformer."
EMA_PREFIX = "model_ema."

# Callbacks of Lightning that the original checkpoints name, under the package's older and newer name.
_CALLBACKS = (
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
    "pytorch_lightning.callbacks.early_stopping.EarlyStopping",
    "lightning.pytorch.callbacks.model_checkpoint.ModelCheckpoint",
    "lightning.pytorch.callbacks.early_stopping.EarlyStopping",
)


class _Stub:
    """What stands where a checkpoint names one of Lightning's callbacks: it does nothing and keeps nothing."""


@contextmanager
def stub_lightning_callbacks() -> Iterator[None]:
    """Let `torch.load(weights_only=True)` take a stub for Lightning's callbacks while the block runs.

    The original Stable Diffusion checkpoints name them; none of their code is run.
    """
    with torch.serialization.safe_globals([(_Stub, name) for name in _CALLBACKS]):
        yield


def load_compvis_state_dict(path: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a CompVis checkpoint, .ckpt or .safetensors, mapped from the file where its format allows.

    Raises ValueError when it is missing, damaged, or a pickle that would run code, none of which is run.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"no checkpoint {path}: give `ckpt_path` the path of a .ckpt or .safetensors file")
    try:
        if path.suffix == ".safetensors":
            content = load_file(path)
        else:
            with stub_lightning_callbacks(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                content = torch.load(
                    path, map_location=torch.get_default_device(), weights_only=True, mmap=zipfile.is_zipfile(path)
                )
    except (
        SafetensorError,
        pickle.UnpicklingError,
        zipfile.BadZipFile,
        RuntimeError,
        OSError,
        EOFError,
        ValueError,
        LookupError,
        AttributeError,
        TypeError,
    ) as error:
        code = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it asks to run {code[1]}" if code else "it is damaged or not a checkpoint"
        raise ValueError(
            f"{path} was not loaded: {reason}; get it again from where it is published, as .safetensors"
        ) from error
    while isinstance(content, Mapping) and "state_dict" in content:
        content = content["state_dict"]
    tensors: dict[str, torch.Tensor] = {}
    if isinstance(content, Mapping):
        tensors = {name: value for name, value in content.items() if isinstance(value, torch.Tensor)}
    if not any(str(name).startswith(UNET_PREFIX) for name in tensors):
        raise ValueError(
            f"{path} holds no U-Net in CompVis' layout ({UNET_PREFIX}...): give `ckpt_path` a whole Stable Diffusion "
            "checkpoint, or `model` a diffusers folder"
        )
    return tensors


_UNET_SIDES = {"down": "input_blocks", "up": "output_blocks"}
_UNET_STEMS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
}
_UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_VAE_PARTS = {
    "mid_block.resnets.0": "mid.block_1",
    "mid_block.resnets.1": "mid.block_2",
    "mid_block.attentions.0": "mid.attn_1",
    "conv_norm_out": "norm_out",
    "conv_shortcut": "nin_shortcut",
    "downsamplers.0": "downsample",
    "upsamplers.0": "upsample",
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}


def unet_key_map(names: Iterable[str]) -> dict[str, str]:
    """Return the name in CompVis' layout of every U-Net parameter, by its name in diffusers'.

    Raises ValueError for a name that a U-Net of Stable Diffusion v1 does not have.
    """
    names = list(names)
    num_resnets = _count(r"down_blocks\.0\.resnets\.(\d+)", names)
    up_blocks_with_attention = set()
    for name in names:
        match = re.match(r"(up_blocks\.\d+)\.attentions", name)
        if match:
            up_blocks_with_attention.add(match[1])
    return {name: UNET_PREFIX + _unet_key(name, num_resnets, up_blocks_with_attention) for name in names}


def _count(pattern: str, names: Iterable[str]) -> int:
    """Return one more than the largest number that `pattern` finds at the beginning of the names."""
    matches = (re.match(pattern, name) for name in names)
    return 1 + max(int(match[1]) for match in matches if match)


def _unet_key(name: str, num_resnets: int, up_blocks_with_attention: set[str]) -> str:
    for stem, compvis_stem in _UNET_STEMS.items():
        if name.startswith(f"{stem}."):
            return _layer_key(compvis_stem, name.removeprefix(f"{stem}."), "resnets" in stem)
    match = re.match(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.*)", name)
    if match is None:
        raise ValueError(f"{name} is no parameter of a Stable Diffusion v1 U-Net")
    side, block, kind, position, rest = match.groups()
    first = int(block) * (num_resnets + 1)  # CompVis counts through all blocks of a side
    if kind == "downsamplers":
        return f"input_blocks.{first + num_resnets + 1}.0.op.{rest.removeprefix('conv.')}"
    if kind == "upsamplers":
        after = 2 if f"up_blocks.{block}" in up_blocks_with_attention else 1
        return f"output_blocks.{first + num_resnets}.{after}.{rest}"
    index = first + int(position) + (side == "down")  # conv_in is the first of the input blocks
    return _layer_key(f"{_UNET_SIDES[side]}.{index}.{int(kind == 'attentions')}", rest, kind == "resnets")


def _layer_key(stem: str, rest: str, is_resnet: bool) -> str:
    head, _, tail = rest.partition(".")
    return f"{stem}.{_UNET_RESNET[head]}.{tail}" if is_resnet else f"{stem}.{rest}"


def convert_to_compvis(
    unet: Mapping[str, torch.Tensor], vae: Mapping[str, torch.Tensor], text_encoder: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Return the state dicts of a Stable Diffusion v1 in diffusers' layout as one in CompVis', with the same values.

    Raises ValueError for a U-Net of another model.
    """
    unet_keys = unet_key_map(unet)
    tensors = {unet_keys[name]: tensor for name, tensor in unet.items()}
    num_up_blocks = _count(r"decoder\.up_blocks\.(\d+)", vae)
    for name, tensor in vae.items():
        if ".attentions." in name and tensor.dim() == 2:
            tensor = tensor[:, :, None, None]  # CompVis' attention is made of 1x1 convolutions
        tensors[VAE_PREFIX + _vae_key(name, num_up_blocks)] = tensor
    for name, tensor in text_encoder.items():
        tensors[f"{TEXT_PREFIX}text_model.{name.removeprefix('text_model.')}"] = tensor
    return tensors


def _vae_key(name: str, num_up_blocks: int) -> str:
    for part, compvis_part in _VAE_PARTS.items():
        name = re.sub(rf"(^|\.){re.escape(part)}\.", rf"\g<1>{compvis_part}.", name)
    name = re.sub(r"down_blocks\.(\d+)\.resnets", r"down.\1.block", name).replace("down_blocks", "down")
    name = re.sub(r"up_blocks\.(\d+)", lambda match: f"up.{num_up_blocks - 1 - int(match[1])}", name)
    return name.replace("resnets", "block")
