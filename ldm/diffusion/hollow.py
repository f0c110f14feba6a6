"""A pipeline as its configs say it is, whose parts have shapes and no weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import ModelMixin
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from ldm.diffusion.components import UnusableModelError, check_configs, read_config
from ldm.diffusion.families import FAMILIES
from ldm.diffusion.family import plain_tokenizer
from ldm.diffusion.load_family import FAMILY_PARTS, VAES, check_unquantised, cut_tokenizers, part_class

_KINDS: dict[str, tuple[type, ...]] = {
    "text_encoder": (PreTrainedModel,),
    "tokenizer": (PreTrainedTokenizerBase, ProcessorMixin),
    "scheduler": (diffusers.SchedulerMixin,),
}
_READ = (*_KINDS, "unet", "transformer", "vae")  # the beginnings of the names of parts
_DENOISERS = ("UNet2DConditionModel", *(denoiser for denoiser, _, _ in FAMILY_PARTS.values()))
_KNOWN = {"vae": VAES, "unet": _DENOISERS, "transformer": _DENOISERS}


def hollow_pipeline(folder: Path) -> Any:
    """Return the pipeline of a diffusers folder, of which the configs and tokenizers alone are read.

    Raises UnusableModelError for a family that is not known, and for parts that are none of its pipeline's.
    """
    path = folder / "model_index.json"
    index = read_config(path)
    class_name = str(index.get("_class_name"))
    if class_name not in FAMILIES:
        raise UnusableModelError(f"{path}: its pipeline is {class_name}, not one of {', '.join(FAMILIES)}")
    if class_name not in FAMILY_PARTS:
        check_configs(folder, is_xl="text_encoder_2" in index)
    parts: dict[str, Any] = {}
    for name, value in index.items():
        if not isinstance(value, list):
            continue
        is_read = name.startswith(_READ) and value != [None, None]
        parts[name] = _read_part(folder, index, name) if is_read else None
    plain = {name: value for name, value in index.items() if isinstance(value, bool)}
    pipe = getattr(diffusers, class_name)(**parts, **plain)
    for name, encoder in parts.items():
        if name.startswith("text_encoder") and encoder is not None:
            tokenizer = plain_tokenizer(pipe, name)
            most = getattr(encoder.config, "max_position_embeddings", tokenizer.model_max_length)
            tokenizer.model_max_length = min(tokenizer.model_max_length, most)
    cut_tokenizers(pipe)
    return pipe


def _read_part(folder: Path, index: dict[str, Any], name: str) -> Any:
    class_name = part_class(folder / "model_index.json", index, name)
    expected = next((kind for start, kind in _KINDS.items() if name.startswith(start)), (ModelMixin,))
    kind: Any = getattr(diffusers if index[name][0] == "diffusers" else transformers, class_name)
    if not issubclass(kind, expected) or class_name not in _KNOWN.get(name, (class_name,)):
        raise UnusableModelError(f"{folder / 'model_index.json'}: its {name} cannot be a {class_name}")
    if expected[0] not in (PreTrainedModel, ModelMixin):
        return kind.from_pretrained(str(folder / name), local_files_only=True)
    config = read_config(folder / name / "config.json")
    check_unquantised(folder / name, config)
    with torch.device("meta"):
        if expected == (ModelMixin,):
            return kind.from_config(config)
        return kind(AutoConfig.from_pretrained(str(folder / name), local_files_only=True))
