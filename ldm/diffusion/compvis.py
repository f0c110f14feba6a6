"""Stable Diffusion v1 checkpoints in CompVis' layout: opened without running code from them, and written.

From CompVis' layout to diffusers' leads `StableDiffusionPipeline.from_single_file`; here is the way back.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from ldm.io.pickles import UnreadablePickleError, load_torch_pickle
from ldm.io.tensors import METADATA_KEY

CHECKPOINT_SUFFIXES = {".ckpt", ".pt", ".pth", ".safetensors"}  # of what is missing; a file that is there is one

UNET_PREFIX = "model.diffusion_model."
VAE_PREFIX = "first_stage_model."
TEXT_PREFIX = "cond_stage_model.transformer."
EMA_PREFIX = "model_ema."
# where one tensor too many is a layer that acts, and no buffer or metadata
LAYER_PREFIXES = (UNET_PREFIX, f"{VAE_PREFIX}encoder.", f"{VAE_PREFIX}decoder.", f"{TEXT_PREFIX}text_model.encoder.")

# What else a file may hold: how its tensors are called, what that is, and what to do.
_WHOLE_CHECKPOINT = "give `ckpt_path` a whole Stable Diffusion v1 checkpoint, or `model` a diffusers folder"
_CONVERTED = "give `model` a diffusers folder of it, as diffusers' from_single_file and save_pretrained make it"
_OTHERS = (
    (r"(^|[._])lora([._]|$)", "a LoRA", "merge it into its model first, and give `model` the folder"),
    (r"control_model\.", "a ControlNet", _WHOLE_CHECKPOINT),
    (r"(emb_params|string_to_param)$", "a textual inversion", _WHOLE_CHECKPOINT),
    (r"conditioner\.embedders\.", "Stable Diffusion XL", _CONVERTED),
    (r"cond_stage_model\.model\.", "Stable Diffusion 2", _CONVERTED),
    (
        r"((unet|vae|text_encoder)\.|(\w+\.)?(down_blocks|up_blocks|mid_block|text_model)\.)",
        "a part of a model in diffusers' layout",
        "give `model` the diffusers folder that it is from",
    ),
)
_PARTS = {"U-Net": UNET_PREFIX, "autoencoder (VAE)": VAE_PREFIX, "text encoder": TEXT_PREFIX}

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
    """Return the tensors of a CompVis checkpoint, mapped from the file where its format allows.

    Its content says whether it is safetensors or a pickle, whatever it is called. Raises ValueError when it is missing,
    damaged, no whole Stable Diffusion v1, or a pickle that would run code, none of which is run.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"no checkpoint {path}: give `ckpt_path` the path of a .ckpt or .safetensors file")
    try:
        if is_safetensors(path):
            _check_is_foreign(path)
            content = load_file(path)
        else:
            with stub_lightning_callbacks(), named_by_content(path) as named:
                content = load_torch_pickle(named)
    except (UnreadablePickleError, SafetensorError, OSError) as error:
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
    fault = _missing(tensors)
    if fault:
        raise ValueError(f"{path} {fault}")
    return tensors


def _check_is_foreign(path: Path) -> None:
    """Raise ValueError when the header of a safetensors file says that it is a part of ours, and no model."""
    with safe_open(path, framework="pt") as opened:
        text = (opened.metadata() or {}).get(METADATA_KEY)
    if text is None:
        return
    try:
        header = json.loads(text)
    except (ValueError, RecursionError):
        header = None
    kind = header.get("file_type", header.get("kind")) if isinstance(header, dict) else "file of this program"
    if kind == "merged checkpoint":
        return
    raise ValueError(f"{path} is no checkpoint but a {kind} that was made for one: {_WHOLE_CHECKPOINT}")


@contextmanager
def named_by_content(path: Path) -> Iterator[Path]:
    """Give the file a name from which torch and diffusers know how to read it, while the block runs."""
    suffix = ".safetensors" if is_safetensors(path) else ".ckpt"
    if path.suffix == suffix:
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        link = Path(folder, f"model{suffix}")
        link.symlink_to(path.resolve())
        yield link


def is_safetensors(path: Path) -> bool:
    """Return whether a file begins as safetensors do: the size of a header in JSON, and the header."""
    with open(path, "rb") as opened:
        return opened.read(9)[8:] == b"{"


def _missing(tensors: Mapping[str, torch.Tensor]) -> str:
    """Return what the tensors of a file lack of a Stable Diffusion v1, and what they are instead; nothing if nothing.

    A ControlNet or a LoRA may stand beside a whole model: what is whole is taken.
    """
    names = [str(name) for name in tensors]
    missing = [part for part, prefix in _PARTS.items() if not any(name.startswith(prefix) for name in names)]
    for pattern, kind, advice in _OTHERS if missing else ():
        if any(re.match(pattern, name) or (kind == "a LoRA" and re.search(pattern, name)) for name in names):
            return f"holds {kind}, and no whole Stable Diffusion v1: {advice}"
    if not missing:
        return _wrong_channels(tensors)
    first = next((name for name in names if name.endswith("input_blocks.0.0.weight")), None)
    prefix = (first or UNET_PREFIX).removesuffix("input_blocks.0.0.weight")
    if "U-Net" in missing and first is not None:
        return (
            f"holds no U-Net in CompVis' layout: its names begin with '{prefix}' in place of '{UNET_PREFIX}'; "
            f"{_WHOLE_CHECKPOINT}"
        )
    return f"holds no {' and no '.join(missing)} in CompVis' layout ({_PARTS[missing[0]]}...): {_WHOLE_CHECKPOINT}"


def _wrong_channels(tensors: Mapping[str, torch.Tensor]) -> str:
    first, latents = (
        tensors.get(name) for name in (f"{UNET_PREFIX}input_blocks.0.0.weight", f"{VAE_PREFIX}post_quant_conv.weight")
    )
    if first is None or latents is None or first.dim() < 2 or latents.dim() < 2 or first.shape[1] == latents.shape[1]:
        return ""
    return (
        f"holds a U-Net of {first.shape[1]} input channels, and its latents have {latents.shape[1]}: models of "
        f"inpainting or depth are not computed here; {_WHOLE_CHECKPOINT}"
    )


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
_ANOTHER_FORMAT = "choose another `format`"
_EMA_UNET = "diffusion_model"  # then the names of the U-Net's weights, without dots
_VAE_KEY = re.compile(
    r"((post_)?quant_conv|(encoder|decoder)\.(conv_in|conv_out|norm_out|mid\.(block_[12]|attn_1)\.\w+|"
    r"(down|up)\.\d+\.(block\.\d+\.\w+|(downsample|upsample)\.conv)))\.(weight|bias)"
)
_TEXT_KEY = re.compile(  # of transformers' CLIPTextModel
    r"embeddings\.(position_ids|(token|position)_embedding\.weight)|final_layer_norm\.(weight|bias)|"
    r"encoder\.layers\.\d+\.(self_attn\.(q|k|v|out)_proj|layer_norm[12]|mlp\.fc[12])\.(weight|bias)"
)


def is_weight(name: str, tensor: torch.Tensor) -> bool:
    """Return whether a checkpoint's tensor is a weight of the model, or the moving average of one of the U-Net's.

    What else it holds (betas, the averages' decay, counters) is no weight and keeps its precision.
    """
    weights = (UNET_PREFIX, VAE_PREFIX, TEXT_PREFIX, f"{EMA_PREFIX}{_EMA_UNET}")
    return tensor.is_floating_point() and name.startswith(weights)


def unet_key_map(names: Iterable[str]) -> dict[str, str]:
    """Return the name in CompVis' layout of every U-Net parameter, by its name in diffusers'.

    Raises ValueError for a name that a U-Net of Stable Diffusion v1 does not have, and where its blocks do not all have
    the same number of layers.
    """
    names = list(names)
    num_resnets = _count(r"down_blocks\.0\.resnets\.(\d+)", names)
    for block in range(_count(r"down_blocks\.(\d+)", names)):
        counts = [_count(rf"{side}_blocks\.{block}\.resnets\.(\d+)", names) for side in _UNET_SIDES]
        if counts != [num_resnets, num_resnets + 1]:
            raise ValueError(
                "CompVis' layout has no place for a U-Net whose blocks have different numbers of layers: "
                f"{_ANOTHER_FORMAT}"
            )
    up_blocks_with_attention = set()
    for name in names:
        match = re.match(r"(up_blocks\.\d+)\.attentions", name)
        if match:
            up_blocks_with_attention.add(match[1])
    return {name: UNET_PREFIX + _unet_key(name, num_resnets, up_blocks_with_attention) for name in names}


def _count(pattern: str, names: Iterable[str]) -> int:
    """Return one more than the largest number that `pattern` finds at the beginning of the names; 0 for none."""
    matches = (re.match(pattern, name) for name in names)
    return 1 + max((int(match[1]) for match in matches if match), default=-1)


def _unet_key(name: str, num_resnets: int, up_blocks_with_attention: set[str]) -> str:
    for stem, compvis_stem in _UNET_STEMS.items():
        if name.startswith(f"{stem}."):
            return _layer_key(compvis_stem, name.removeprefix(f"{stem}."), "resnets" in stem)
    match = re.match(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.*)", name)
    if match is None:
        raise ValueError(f"{name} is no parameter of a Stable Diffusion v1 U-Net: {_ANOTHER_FORMAT}")
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
    if not is_resnet:
        return f"{stem}.{rest}"
    if head not in _UNET_RESNET:
        raise ValueError(f"{head} is no part of a Stable Diffusion v1 U-Net's blocks: {_ANOTHER_FORMAT}")
    return f"{stem}.{_UNET_RESNET[head]}.{tail}"


def convert_to_compvis(
    unet: Mapping[str, torch.Tensor], vae: Mapping[str, torch.Tensor], text_encoder: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Return the state dicts of a Stable Diffusion v1 in diffusers' layout as one in CompVis', with the same values.

    Raises ValueError for another model's, whose tensors would have no name of their own there, or another shape.
    """
    _check_is_version_1(unet, text_encoder)
    unet_keys = unet_key_map(unet)
    num_up_blocks = _count(r"decoder\.up_blocks\.(\d+)", vae)
    pairs = [(unet_keys[name], tensor) for name, tensor in unet.items()]
    for name, tensor in vae.items():
        if ".attentions." in name and tensor.dim() == 2:
            tensor = tensor[:, :, None, None]  # CompVis' attention is made of 1x1 convolutions
        key = _vae_key(name, num_up_blocks)
        if not _VAE_KEY.fullmatch(key):
            raise ValueError(f"{name} is no parameter of Stable Diffusion v1's autoencoder: {_ANOTHER_FORMAT}")
        pairs.append((VAE_PREFIX + key, tensor))
    for name, tensor in text_encoder.items():
        key = name.removeprefix("text_model.")
        if not _TEXT_KEY.fullmatch(key):
            raise ValueError(f"{name} is no parameter of Stable Diffusion v1's text encoder: {_ANOTHER_FORMAT}")
        pairs.append((f"{TEXT_PREFIX}text_model.{key}", tensor))
    tensors: dict[str, torch.Tensor] = {}
    for key, tensor in pairs:
        if key in tensors:
            raise ValueError(f"two of the model's tensors are both {key} in CompVis' layout: {_ANOTHER_FORMAT}")
        tensors[key] = tensor
    return tensors


def _check_is_version_1(unet: Mapping[str, torch.Tensor], text_encoder: Mapping[str, torch.Tensor]) -> None:
    """Raise ValueError for a U-Net or a text encoder of Stable Diffusion v1's names and another structure."""
    for name, tensor in unet.items():
        if name.endswith("proj_in.weight") and tensor.dim() != 4:
            raise ValueError(f"{name} is linear, and a convolution in Stable Diffusion v1: {_ANOTHER_FORMAT}")
    widths = {tensor.shape[-1] for name, tensor in unet.items() if name.endswith("attn2.to_k.weight")}
    embeddings = [tensor for name, tensor in text_encoder.items() if name.endswith("token_embedding.weight")]
    widths |= {tensor.shape[-1] for tensor in embeddings}
    if not embeddings or len(widths) != 1:
        raise ValueError(
            f"the U-Net does not take what the text encoder gives it, as in Stable Diffusion v1: {_ANOTHER_FORMAT}"
        )


def _vae_key(name: str, num_up_blocks: int) -> str:
    for part, compvis_part in _VAE_PARTS.items():
        name = re.sub(rf"(^|\.){re.escape(part)}\.", rf"\g<1>{compvis_part}.", name)
    name = re.sub(r"down_blocks\.(\d+)\.resnets", r"down.\1.block", name).replace("down_blocks", "down")
    name = re.sub(r"up_blocks\.(\d+)", lambda match: f"up.{num_up_blocks - 1 - int(match[1])}", name)
    return name.replace("resnets", "block")
