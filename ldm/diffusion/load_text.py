"""Load what turns prompts into embeddings, without a denoiser, and without running code from a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

from ldm.diffusion.components import (
    WHOLE_MODEL,
    UnusableModelError,
    check_class,
    check_text_classes,
    check_text_part,
    read_config,
)
from ldm.diffusion.consistency import check_text
from ldm.diffusion.load import (
    SUPPORTED_PIPELINES,
    TEXT_ENCODERS,
    check_weights,
    find_settings,
    load_part,
    silence_hf_logging,
)
from ldm.diffusion.text_model import TextModel

_ADVICE = (
    "give `text_encoder` a diffusers folder of Stable Diffusion, of which nothing else is read, or a folder with "
    "config.json, tokenizer and model.safetensors of its text encoder"
)
_TOKENIZERS = {"CLIPTextModel": "CLIPTokenizer", "BertModel": "BertTokenizer"}  # where no model_index.json names one


def load_text_model(source: str | Path, device: torch.device | None = None, with_pooled: bool = False) -> TextModel:
    """Load the text encoders and tokenizers of a Stable Diffusion model onto `device`; nothing else of it is read.

    `source` is a diffusers folder, which needs no other parts, or a folder with one text encoder and its tokenizer.
    `with_pooled` asks for its pooled embedding too. Raises ValueError where it is none, lacks that, is damaged, or says
    in its configs what is not computed here.
    """
    silence_hf_logging()
    folder = Path(source)
    device = device or torch.accelerator.current_accelerator(check_available=True) or torch.get_default_device()
    try:
        pipeline = _load(folder)
        check_text(pipeline, source)
        for name in ("text_encoder", "text_encoder_2"):
            encoder = getattr(pipeline, name, None)
            if encoder is not None:
                check_weights(encoder, source)
        name = folder.resolve().name
        if with_pooled and (hasattr(pipeline, "text_encoder_2") or getattr(pipeline.text_encoder, "pooler", 0) is None):
            raise UnusableModelError(f"{source} has no single text encoder with a pooled embedding: leave `pooled` out")
        options: dict[str, Any] = {"settings_path": find_settings(source), "has_own_pooled": with_pooled}
        model = TextModel(name, name, pipeline, device, **options)
        finite = bool(model.encode_prompt([""]).isfinite().all())
    except UnusableModelError as error:  # which may say what a whole model needs
        raise UnusableModelError(str(error).replace(WHOLE_MODEL, _ADVICE)) from error
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # what the libraries raise for a file that is wrong has no end, see `load_model`
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"cannot load a text encoder from '{source}': {_ADVICE}: {reason}") from error
    if not finite:
        raise ValueError(f"the text encoder of {source} makes NaN or infinity: get it again")
    return model


def _load(folder: Path) -> Any:
    """Return the pipeline of a folder with nothing in it but text encoders and tokenizers."""
    if not folder.is_dir():
        raise UnusableModelError(f"there is no folder {folder}: {_ADVICE}")
    places, index = {"text_encoder": folder, "tokenizer": folder}, _index(folder)
    is_xl = index.get("_class_name") == StableDiffusionXLPipeline.__name__
    if (folder / "text_encoder").is_dir():
        names = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
        places = {name: folder / name for name in names if is_xl or not name.endswith("_2")}
    parts: dict[str, Any] = {}
    for suffix in ("", "_2") if is_xl else ("",):
        encoder, tokenizer = f"text_encoder{suffix}", f"tokenizer{suffix}"
        classes = _classes(folder, index, places[encoder], suffix)
        check_text_part(places[encoder], places[tokenizer], classes[0])
        kind = transformers.CLIPTextModelWithProjection if suffix else TEXT_ENCODERS[classes[0]]
        parts[encoder] = load_part(kind, places[encoder], None)
        reader: Any = getattr(transformers, classes[1])
        parts[tokenizer] = reader.from_pretrained(str(places[tokenizer]), local_files_only=True)
    parts |= dict.fromkeys(("vae", "unet", "scheduler", "feature_extractor"))
    if is_xl:
        return StableDiffusionXLPipeline(**parts, add_watermarker=False)
    return StableDiffusionPipeline(**parts, **dict[str, Any](safety_checker=None), requires_safety_checker=False)


def _index(folder: Path) -> dict[str, Any]:
    """Return the model_index.json of a folder; empty where it has none. Raises UnusableModelError as for a model."""
    path = folder / "model_index.json"
    if not path.is_file():
        return {}
    index = read_config(path)
    if index.get("_class_name") not in SUPPORTED_PIPELINES:
        known = ", ".join(SUPPORTED_PIPELINES)
        raise UnusableModelError(f"{path}: its pipeline is {index.get('_class_name')}, not one of {known}: {_ADVICE}")
    is_xl = index["_class_name"] == StableDiffusionXLPipeline.__name__
    for name in ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"):
        if is_xl or not name.endswith("_2"):
            check_class(path, name, index.get(name))
    check_text_classes(path, index)
    return index


def _classes(folder: Path, index: dict[str, Any], part: Path, suffix: str) -> tuple[str, str]:
    """Return the classes of a text encoder and its tokenizer."""
    if index:
        return index[f"text_encoder{suffix}"][1], index[f"tokenizer{suffix}"][1]
    named = read_config(part / "config.json").get("architectures")
    found = str(named[0]) if isinstance(named, list) and named else "CLIPTextModel"
    if found not in _TOKENIZERS:
        raise UnusableModelError(f"{part}: {found} is no text encoder of Stable Diffusion: {_ADVICE}")
    return found, _TOKENIZERS[found]
