"""What the configs of a diffusers folder may say: all that would make another model than the one computed with is
refused by name.
"""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers

from ldm.io.checks import is_number
from ldm.io.errors import notify

WHOLE_MODEL = "give `model` a whole diffusers folder, of Stable Diffusion or another family"
OPTIONAL_PARTS = ("safety_checker", "feature_extractor", "image_encoder")  # none of them acts on an image's content
_CLIP_TOKENIZERS = ("CLIPTokenizer", "CLIPTokenizerFast")
_BERT_TOKENIZERS = ("BertTokenizer", "BertTokenizerFast")
# By the class of a text encoder: the classes of its tokenizer, and the files that hold its vocabulary where there is no
# tokenizer.json. Stable Diffusion's pipeline takes any encoder whose first output has one row for each token.
_TOKENIZERS = {
    "CLIPTextModel": _CLIP_TOKENIZERS,
    "CLIPTextModelWithProjection": _CLIP_TOKENIZERS,
    "BertModel": _BERT_TOKENIZERS,
}
_VOCABULARY_FILES = {
    "CLIPTextModel": ("vocab.json", "merges.txt"),
    "CLIPTextModelWithProjection": ("vocab.json", "merges.txt"),
    "BertModel": ("vocab.txt",),
}
_DECODER_FIELDS = ("is_decoder", "add_cross_attention")
_CLASSES = {
    "unet": ("diffusers", ("UNet2DConditionModel",)),
    "vae": ("diffusers", ("AutoencoderKL",)),
    "text_encoder": ("transformers", ("CLIPTextModel", "BertModel")),
    "text_encoder_2": ("transformers", ("CLIPTextModelWithProjection",)),
    "tokenizer": ("transformers", _CLIP_TOKENIZERS + _BERT_TOKENIZERS),
    "tokenizer_2": ("transformers", _CLIP_TOKENIZERS),
}
_SCHEDULERS = {scheduler.name for scheduler in KarrasDiffusionSchedulers} | {
    "DDIMParallelScheduler",
    "DDPMParallelScheduler",
    "LCMScheduler",
    "SASolverScheduler",
    "TCDScheduler",
}
_BLOCKS = {
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "mid_block_type": ("UNetMidBlock2DCrossAttn", "UNetMidBlock2D", None),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
}
# Fields of a U-Net that would let something else than latents, timestep and prompt act, or another layer than a text
# layer see the prompt: the values that do not, and what others mean.
_UNET_FIELDS: dict[str, tuple[tuple[Any, ...], str]] = {
    "time_cond_proj_dim": ((None,), "it takes the guidance scale as an input, as latent consistency models do"),
    "class_embed_type": ((None,), "it takes a class as an input"),
    "num_class_embeds": ((None,), "it takes a class as an input"),
    "class_embeddings_concat": ((None, False), "it takes a class as an input"),
    "encoder_hid_dim_type": ((None,), "it projects the prompt's embedding before its layers see it"),
    "encoder_hid_dim": ((None,), "it projects the prompt's embedding before its layers see it"),
    "cross_attention_norm": ((None,), "it normalises the prompt's embedding before its layers see it"),
    "only_cross_attention": ((None, False), "its self-attention sees the prompt too"),
    "mid_block_only_cross_attention": ((None, False), "its self-attention sees the prompt too"),
    "dual_cross_attention": ((None, False), "it takes two embeddings"),
    "attention_type": ((None, "default"), "it takes boxes as an input, as GLIGEN does"),
}
# Fields of any config that ask for code, for other weights, or for a layer-wise change of the config.
_FOREIGN_FIELDS = ("auto_map", "quantization_config", "per_layer_config", "fusion_config", "distributed_config")
_ATTENTION_FIELDS = ("attn_implementation", "_attn_implementation")  # other values name kernels to fetch and to run
_MAX_LAYERS, _MAX_SIZE = 64, 2**16
# The whole numbers, or lists of them, of U-Net and autoencoder, and the most that a model can have.
_COUNTS = {
    "sample_size": _MAX_SIZE,
    "in_channels": _MAX_SIZE,
    "out_channels": _MAX_SIZE,
    "latent_channels": _MAX_SIZE,
    "block_out_channels": _MAX_SIZE,
    "norm_num_groups": _MAX_SIZE,
    "cross_attention_dim": _MAX_SIZE,
    "attention_head_dim": _MAX_SIZE,
    "layers_per_block": _MAX_LAYERS,
    "transformer_layers_per_block": _MAX_LAYERS,
}
_NUMBERS = ("norm_eps", "mid_block_scale_factor", "resnet_out_scale_factor", "dropout", "freq_shift")
_SPACINGS = ("linspace", "leading", "trailing")


class UnusableModelError(ValueError):
    """Say which file of a model cannot be read, or which field of it says what is not computed here."""


def read_config(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file of a model's folder.

    Raises UnusableModelError when it is missing or no object, names a key twice, or holds NaN or a number that is too
    large for a float.
    """
    try:
        content = json.loads(
            path.read_text(encoding="utf-8"),
            object_pairs_hook=_unique,
            parse_float=_finite,
            parse_constant=_constant,
        )
    except FileNotFoundError as error:
        raise UnusableModelError(f"{path} is missing: {WHOLE_MODEL}") from error
    except (OSError, ValueError, RecursionError) as error:
        reason = "it is nested too deep" if isinstance(error, RecursionError) else " ".join(str(error).split())[:200]
        raise UnusableModelError(f"cannot read {path}: {reason}; get the model again") from error
    if not isinstance(content, dict):
        raise UnusableModelError(f"{path} holds no JSON object but a {type(content).__name__}: get the model again")
    return content


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"it says {next(name for name in names if names.count(name) > 1)} twice")
    return content


def _finite(text: str) -> float:
    if not math.isfinite(float(text)):
        raise ValueError(f"{text} is no finite number")
    return float(text)


def _constant(text: str) -> float:
    if text == "NaN":
        raise ValueError("NaN is no number")
    return float(text)  # infinity, which is what DPM-Solver's lambda_min_clipped is without a bound


def check_index(path: Path, index: Mapping[str, Any], has_two_encoders: bool) -> None:
    """Raise UnusableModelError unless the parts in a model_index.json are those that its pipeline computes with."""
    needed = ["unet", "vae", "scheduler", "text_encoder", "tokenizer"]
    if has_two_encoders:
        needed += ["text_encoder_2", "tokenizer_2"]
    for name in needed:
        if name not in index:
            raise UnusableModelError(f"{path} names no {name}: {WHOLE_MODEL}")
    for name, value in index.items():
        is_part = isinstance(value, list) and value != [None, None]
        if name in needed:
            check_class(path, name, value)
        elif is_part and name not in OPTIONAL_PARTS:
            raise UnusableModelError(f"{path}: nothing here computes with its {name} {value}: {WHOLE_MODEL}")
    check_text_classes(path, index)


def check_text_classes(path: Path, index: Mapping[str, Any]) -> None:
    """Raise UnusableModelError where a model_index.json names a tokenizer that is not its text encoder's."""
    encoder_class, tokenizer_class = index["text_encoder"][1], index["tokenizer"][1]
    if tokenizer_class not in _TOKENIZERS[encoder_class]:
        raise UnusableModelError(
            f"{path}: its tokenizer is {tokenizer_class}, and its text encoder {encoder_class}: they are not of one "
            "model"
        )


def check_class(path: Path, name: str, value: Any) -> None:
    """Raise UnusableModelError where a model_index.json names another class for a part than is computed with."""
    library, class_name = value if isinstance(value, list) and len(value) == 2 else (None, None)
    if name == "scheduler":
        _check_scheduler_class(path, library, str(class_name))
        return
    wanted_library, wanted = _CLASSES[name]
    if library != wanted_library or class_name not in wanted:
        raise UnusableModelError(
            f"{path}: its {name} is {value}, not {wanted[0]} of {wanted_library}, and no other code is run: "
            f"{WHOLE_MODEL}"
        )


def class_of(folder: Path, part: str) -> str:
    """Return the class of a model's text encoder: what its model_index.json says, or else Stable Diffusion's."""
    path = folder / "model_index.json"
    index = read_config(path) if path.is_file() else {}
    default = "CLIPTextModelWithProjection" if part.endswith("_2") else "CLIPTextModel"
    return index[part][1] if part in index else default


def _check_scheduler_class(path: Path, library: Any, class_name: str) -> None:
    found = getattr(diffusers, class_name, None) if library == "diffusers" else None
    if class_name not in _SCHEDULERS or found is None:
        raise UnusableModelError(
            f"{path}: its scheduler {class_name} of {library} does not sample Stable Diffusion: give it another, such "
            "as DDIMScheduler of diffusers"
        )
    packages: list[str] = getattr(found, "_backends", [])  # of what stands for a class whose packages are missing
    if packages:
        raise UnusableModelError(
            f"{path}: its scheduler {class_name} needs the packages {' and '.join(packages)}: install them, or give it "
            "another, such as DDIMScheduler"
        )


def check_configs(folder: Path, is_xl: bool) -> None:
    """Raise UnusableModelError unless the configs of a diffusers folder are those of a model that is computed here."""
    unet, vae = folder / "unet" / "config.json", folder / "vae" / "config.json"
    unet_config, vae_config = read_config(unet), read_config(vae)
    for path, config, class_name in (
        (unet, unet_config, "UNet2DConditionModel"),
        (vae, vae_config, "AutoencoderKL"),
    ):
        if config.get("_class_name", class_name) != class_name:
            raise UnusableModelError(f"{path}: it is of a {config['_class_name']}, not of {class_name}: {WHOLE_MODEL}")
        check_foreign(path, config)
        _check_counts(path, config)
        _check_booleans(path, config, getattr(diffusers, class_name))
    _check_unet(unet, unet_config, is_xl)
    _check_vae(vae, vae_config, is_xl)
    latent_channels = vae_config.get("latent_channels", 4)
    for field in ("in_channels", "out_channels"):
        channels = unet_config.get(field, 4)
        if channels != latent_channels:
            raise UnusableModelError(
                f"{unet}: {field} is {channels}, and the autoencoder's latents have {latent_channels} channels: "
                "models of inpainting, depth or learned variance are not computed here"
            )
    for suffix in ("", "_2") if is_xl else ("",):
        part = folder / f"text_encoder{suffix}"
        check_text_part(part, folder / f"tokenizer{suffix}", class_of(folder, part.name))
    path = folder / "scheduler" / "scheduler_config.json"
    scheduler_config = read_config(path)
    class_name = (
        read_config(folder / "model_index.json")["scheduler"][1] if (folder / "model_index.json").is_file() else ""
    )
    if class_name:
        _check_booleans(path, scheduler_config, getattr(diffusers, class_name))
    if class_name and scheduler_config.get("_class_name", class_name) != class_name:
        notify(
            f"{path} names {scheduler_config['_class_name']}, and model_index.json {class_name}: the latter is used, "
            "as by diffusers"
        )
    _check_count(path, "num_train_timesteps", scheduler_config.get("num_train_timesteps", 1000), _MAX_SIZE)
    steps_offset = scheduler_config.get("steps_offset", 0)
    if type(steps_offset) is not int or not 0 <= steps_offset <= scheduler_config.get("num_train_timesteps", 1000):
        raise UnusableModelError(f"{path}: steps_offset {steps_offset!r} is no number of timesteps")
    if scheduler_config.get("timestep_spacing", "leading") not in _SPACINGS:
        raise UnusableModelError(
            f"{path}: timestep_spacing {scheduler_config['timestep_spacing']!r} is none of {', '.join(_SPACINGS)}"
        )
    if scheduler_config.get("use_flow_sigmas"):
        raise UnusableModelError(f"{path}: use_flow_sigmas is true: models of flow matching are not computed here")


def check_text_part(part: Path, tokenizer: Path, encoder_class: str) -> None:
    """Raise UnusableModelError unless the configs of a text encoder, in `part`, and a tokenizer are computed by."""
    encoder_config = read_config(part / "config.json")
    check_foreign(part / "config.json", encoder_config)
    _check_text_encoder(part / "config.json", encoder_config)
    if (part / "adapter_config.json").exists():
        raise UnusableModelError(
            f"{part / 'adapter_config.json'}: an adapter is not loaded: remove it, or merge it with peft"
        )
    _check_tokenizer(tokenizer, _VOCABULARY_FILES[encoder_class])


def _check_booleans(path: Path, config: Mapping[str, Any], kind: type) -> None:
    """Raise UnusableModelError for a field that is true or false by its class, and something else here."""
    for field, parameter in inspect.signature(kind.__init__).parameters.items():
        if isinstance(parameter.default, bool) and not isinstance(config.get(field, False), bool):
            raise UnusableModelError(f"{path}: {field} {config[field]!r} is neither true nor false")


def check_foreign(path: Path, config: Mapping[str, Any]) -> None:
    """Raise UnusableModelError for a field of a config that asks for code, or for other weights."""
    for field in _FOREIGN_FIELDS:
        if config.get(field) is not None:
            raise UnusableModelError(f"{path}: {field} is not followed: {WHOLE_MODEL} without it")
    for field in _ATTENTION_FIELDS:
        if config.get(field) not in (None, "eager", "sdpa"):
            raise UnusableModelError(f"{path}: {field} {config[field]!r} would fetch code: remove it from the file")


def _check_text_encoder(path: Path, config: Mapping[str, Any]) -> None:
    for field in _DECODER_FIELDS:
        if config.get(field):
            raise UnusableModelError(
                f"{path}: {field} is {config[field]!r}: a text encoder is no decoder: {WHOLE_MODEL}"
            )
    if config.get("use_attention_mask"):
        raise UnusableModelError(
            f"{path}: use_attention_mask is true: padding is never masked here, as in Stable Diffusion: {WHOLE_MODEL}"
        )


def _check_tokenizer(folder: Path, vocabulary_files: Sequence[str]) -> None:
    if not (folder / "tokenizer.json").is_file():
        for name in vocabulary_files:
            if not (folder / name).is_file():
                raise UnusableModelError(f"{folder / name} is missing: {WHOLE_MODEL}")
    for name in ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"):
        path = folder / name
        config = read_config(path) if path.exists() else {}
        check_foreign(path, config)
        if config.get("truncation_side", "right") != "right":
            raise UnusableModelError(
                f"{path}: truncation_side {config['truncation_side']!r} is not followed: set right"
            )
        length = config.get("model_max_length")
        is_number = isinstance(length, int | float) and not isinstance(length, bool)
        if length is not None and not (is_number and length >= 2 and length == int(length)):
            raise UnusableModelError(f"{path}: model_max_length {length!r} is no whole number from 2: {WHOLE_MODEL}")


def _check_counts(path: Path, config: Mapping[str, Any]) -> None:
    for field, most in _COUNTS.items():
        if config.get(field) is not None:
            _check_count(path, field, config[field], most)
    for field in _NUMBERS:
        if field in config and not is_number(config[field]):
            raise UnusableModelError(f"{path}: {field} {config[field]!r} is no number")


def _check_count(path: Path, field: str, value: Any, most: int) -> None:
    numbers = list(_flat(value))
    if not numbers or not all(type(number) is int and 1 <= number <= most for number in numbers):
        raise UnusableModelError(f"{path}: {field} {str(value)[:50]!r} is no whole number from 1 to {most}")


def _flat(value: Any) -> Iterable[Any]:
    """Yield a value, or what is in a list of lists."""
    if not isinstance(value, list):
        yield value
        return
    for item in value:
        yield from _flat(item)


def _check_unet(path: Path, config: Mapping[str, Any], is_xl: bool) -> None:
    for field, (plain, meaning) in _UNET_FIELDS.items():
        if not all(value in plain for value in _flat(config.get(field))):
            raise UnusableModelError(f"{path}: {field} is {config[field]!r}: {meaning}, which is not computed here")
    wanted = "text_time" if is_xl else None
    if config.get("addition_embed_type") != wanted:
        raise UnusableModelError(
            f"{path}: addition_embed_type is {config.get('addition_embed_type')!r}, and its pipeline's is {wanted!r}"
        )
    for field in ("sample_size", "cross_attention_dim"):
        value = config.get(field, 1280 if field == "cross_attention_dim" else None)
        if value is None or len(set(_flat(value))) > 1:
            raise UnusableModelError(f"{path}: {field} is {value!r}, and one number is needed")
    has_cross_attention = False
    for field, known in _BLOCKS.items():
        kinds = list(_flat(config.get(field, known[0])))
        if not all(kind in known for kind in kinds):
            raise UnusableModelError(
                f"{path}: {field} is {kinds}, of which {', '.join(map(str, known))} are computed here"
            )
        has_cross_attention = has_cross_attention or any("CrossAttn" in str(kind) for kind in kinds)
    if not has_cross_attention:
        raise UnusableModelError(f"{path}: none of its blocks has cross-attention, and so no prompt acts on it")


def _check_vae(path: Path, config: Mapping[str, Any], is_xl: bool) -> None:
    for field in ("in_channels", "out_channels"):
        if config.get(field, 3) != 3:
            raise UnusableModelError(f"{path}: {field} is {config[field]}, and an image has 3 channels")
    scale: Any = config.get("scaling_factor", 0.18215)
    if not is_number(scale) or scale <= 0:
        raise UnusableModelError(f"{path}: scaling_factor {scale!r} is no number that scales latents")
    for field in ("shift_factor",) if is_xl else ("shift_factor", "latents_mean", "latents_std"):
        if config.get(field) not in (None, 0):  # which diffusers' own pipeline of such a model leaves out
            raise UnusableModelError(f"{path}: {field} is not followed by Stable Diffusion's pipelines: {WHOLE_MODEL}")
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if (mean is None) != (std is None):
        raise UnusableModelError(f"{path}: of latents_mean and latents_std one is missing, and both or none are needed")
    for field, values in (("latents_mean", mean), ("latents_std", std)):
        if values is None:
            continue
        numbers = list(_flat(values))
        channels = config.get("latent_channels", 4)
        if len(numbers) != channels or not all(map(is_number, numbers)) or (field == "latents_std" and 0 in numbers):
            raise UnusableModelError(f"{path}: {field} {values!r} is no list of {channels} numbers")
