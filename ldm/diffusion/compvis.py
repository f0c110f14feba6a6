"""TODO diffusion.compvis."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
import pickle
import re
from safetensors import SafetensorError
from safetensors.torch import load_file
import torch
import warnings
import zipfile


CHECKPOINT_SUFFIXES = {".ckpt", ".pt", ".safetensors"}


UNET_PREFIX, VAE_PREFIX, TEXT_PREFIX, EMA_PREFIX = "model.diffusion_model.", "first_stage_model.", "cond_stage_model.transformer.", "model_ema."


_CALLBACKS = [f"{library}.callbacks.{name}" for library in ("pytorch_lightning", "lightning.pytorch")
              for name in ("model_checkpoint.ModelCheckpoint", "early_stopping.EarlyStopping")]


class _Stub:
    """What stands where a checkpoint names one of Lightning's callbacks: it does nothing and keeps nothing."""


@contextmanager
def stub_lightning_callbacks() -> Iterator[None]:
    """While the block runs, `torch.load(weights_only=True)` takes `_Ignored` for the callbacks that the original Stable
    Diffusion checkpoints name, and runs none of their code."""
    with torch.serialization.safe_globals([(_Stub, name) for name in _CALLBACKS]):
        yield


def load_compvis_state_dict(path: Path) -> dict[str, torch.Tensor]:
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
            with stub_lightning_callbacks(), warnings.catch_warnings():
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
    if not any(str(name).startswith(UNET_PREFIX) for name in tensors):
        raise ValueError(f"{path} holds no U-Net in CompVis' layout ({UNET_PREFIX}...): pass --ckpt_path a whole Stable Diffusion "
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


def unet_key_map(names: Iterable[str]) -> dict[str, str]:
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

    return {name: UNET_PREFIX + renamed(name) for name in names}


def convert_to_compvis(unet: Mapping[str, torch.Tensor], vae: Mapping[str, torch.Tensor],
               text_encoder: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The state dicts of a Stable Diffusion v1 in diffusers' layout as one of CompVis' checkpoints: the same values."""
    blocks = 1 + max(int(found[1]) for found in (re.match(r"decoder\.up_blocks\.(\d+)", name) for name in vae) if found)
    names = unet_key_map(unet)
    tensors = {names[name]: tensor for name, tensor in unet.items()}
    for name, tensor in vae.items():
        if ".attentions." in name and tensor.dim() == 2:
            tensor = tensor[:, :, None, None]  # CompVis' attention is made of 1x1 convolutions
        for part, other in _VAE_PARTS.items():
            name = re.sub(rf"(^|\.){re.escape(part)}\.", rf"\g<1>{other}.", name)
        name = re.sub(r"down_blocks\.(\d+)\.resnets", r"down.\1.block", name).replace("down_blocks", "down")
        name = re.sub(r"up_blocks\.(\d+)", lambda found: f"up.{blocks - 1 - int(found[1])}", name).replace("resnets", "block")
        tensors[VAE_PREFIX + name] = tensor
    for name, tensor in text_encoder.items():
        tensors[f"{TEXT_PREFIX}text_model.{name.removeprefix('text_model.')}"] = tensor
    return tensors
