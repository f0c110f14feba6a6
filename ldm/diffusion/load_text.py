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
from ldm.diffusion.families import FAMILIES
from ldm.diffusion.hollow import hollow_pipeline
from ldm.diffusion.load import (
    SUPPORTED_PIPELINES,
    TEXT_ENCODERS,
    check_weights,
    find_settings,
    load_part,
    silence_hf_logging,
)
from ldm.diffusion.load_family import FAMILY_PARTS, cut_tokenizers, read_text_parts
from ldm.diffusion.text_layers import text_layers
from ldm.diffusion.text_model import TextModel

_ADVICE = (
    "give `text_encoder` a diffusers folder, of which nothing else is read, or one with config.json, tokenizer and "
    "model.safetensors of a text encoder of Stable Diffusion"
)
_TOKENIZERS = {"CLIPTextModel": "CLIPTokenizer", "BertModel": "BertTokenizer"}  # where no model_index.json names one


def load_text_model(source: str | Path, device: torch.device | None = None, with_pooled: bool = False) -> TextModel:
    """Load the text encoders and tokenizers of a model onto `device`; of nothing else the weights are read.

    `source` is a diffusers folder, which needs no other parts but, beside Stable Diffusion 1 to XL, their configs; or a
    folder with one text encoder of Stable Diffusion and its tokenizer.
    `with_pooled` asks for its pooled embedding too. Raises ValueError where it is none, lacks that, is damaged, or says
    in its configs what is not computed here.
    """
    silence_hf_logging()
    folder = Path(source)
    device = device or torch.accelerator.current_accelerator(check_available=True) or torch.get_default_device()
    try:
        pipeline = _load(folder)
        if type(pipeline).__name__ in SUPPORTED_PIPELINES:
            check_text(pipeline, source)
        for name in ("text_encoder", "text_encoder_2", "text_encoder_3"):
            encoder = getattr(pipeline, name, None)
            if encoder is not None:
                check_weights(encoder, source)
        name = folder.resolve().name
        is_one = type(pipeline) is StableDiffusionPipeline and getattr(pipeline.text_encoder, "pooler", 0) is not None
        if with_pooled and not is_one:
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
    class_name = str(read_config(folder / "model_index.json").get("_class_name")) if _has_index(folder) else ""
    if class_name in FAMILY_PARTS:
        return _load_family(folder, class_name)
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


def _load_family(folder: Path, class_name: str) -> Any:
    """Return the pipeline of a folder of any other family, with weights of its text encoders alone."""
    pipeline = hollow_pipeline(folder)
    norms = {layer.norm for layer in text_layers(pipeline.transformer).found.values()} - {""}
    if norms:
        raise UnusableModelError(
            f"the text layers of {folder} see prompts behind a norm ({', '.join(norms)}), so that its text encoders "
            "alone do not say what to change: give `model` the whole model instead"
        )
    pipeline.register_modules(**read_text_parts(folder, class_name, None))
    cut_tokenizers(pipeline)
    return pipeline


def _has_index(folder: Path) -> bool:
    return (folder / "model_index.json").is_file()


def _index(folder: Path) -> dict[str, Any]:
    """Return the model_index.json of a folder; empty where it has none. Raises UnusableModelError as for a model."""
    path = folder / "model_index.json"
    if not _has_index(folder):
        return {}
    index = read_config(path)
    if index.get("_class_name") not in SUPPORTED_PIPELINES:
        known = ", ".join(FAMILIES)
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
