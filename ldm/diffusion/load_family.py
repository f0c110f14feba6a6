"""Load a pipeline of any family but Stable Diffusion 1 to XL from a diffusers folder, and run no code from it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from accelerate import init_empty_weights
from safetensors import SafetensorError

from ldm.diffusion.components import UnusableModelError, check_foreign, read_config
from ldm.diffusion.families import FAMILIES
from ldm.diffusion.family import check_padding, plain_tokenizer
from ldm.diffusion.weights import file_states, map_tensors, weight_files

_TOKENIZER = re.compile(r"\w*(Tokenizer|TokenizerFast|Processor)|TokenizersBackend")
_TEXT_ENCODERS = (
    "CLIPTextModel",
    "CLIPTextModelWithProjection",
    "BertModel",
    "T5EncoderModel",
    "UMT5EncoderModel",
    "Gemma2Model",
    "Qwen3ForCausalLM",
    "Mistral3ForConditionalGeneration",
)
VAES = ("AutoencoderKL", "AutoencoderDC", "AutoencoderKLFlux2")
_FLOW_SCHEDULERS = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler")
_SCHEDULERS = (*_FLOW_SCHEDULERS, "DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "DDIMScheduler")
# The class of the denoiser, the text encoders that a pipeline must have, and those that it may lack.
FAMILY_PARTS: dict[str, tuple[str, tuple[str, ...], tuple[str, ...]]] = {
    "StableDiffusion3Pipeline": ("SD3Transformer2DModel", ("text_encoder", "text_encoder_2"), ("text_encoder_3",)),
    "FluxPipeline": ("FluxTransformer2DModel", ("text_encoder", "text_encoder_2"), ()),
    "PixArtAlphaPipeline": ("PixArtTransformer2DModel", ("text_encoder",), ()),
    "PixArtSigmaPipeline": ("PixArtTransformer2DModel", ("text_encoder",), ()),
    "SanaPipeline": ("SanaTransformer2DModel", ("text_encoder",), ()),
    "AuraFlowPipeline": ("AuraFlowTransformer2DModel", ("text_encoder",), ()),
    "Flux2Pipeline": ("Flux2Transformer2DModel", ("text_encoder",), ()),
    "Flux2KleinPipeline": ("Flux2Transformer2DModel", ("text_encoder",), ()),
    "Lumina2Pipeline": ("Lumina2Transformer2DModel", ("text_encoder",), ()),
}
_OPTIONAL = ("image_encoder", "feature_extractor")


def load_family(folder: Path, class_name: str, variant: str | None) -> Any:
    """Return the pipeline of the class in a diffusers folder, its denoiser mapped from its files, all else in float32.

    Raises UnusableModelError for parts that are missing, or of other classes, and for what would be another model.
    """
    path = folder / "model_index.json"
    index = read_config(path)
    denoiser_class, _, _ = FAMILY_PARTS[class_name]
    parts: dict[str, Any] = dict.fromkeys(name for name in _OPTIONAL if name in index)
    parts["transformer"] = _read_denoiser(
        folder / "transformer", part_class(path, index, "transformer"), denoiser_class, variant
    )
    parts |= read_text_parts(folder, class_name, variant)
    vae_class = part_class(path, index, "vae")
    if vae_class not in VAES:
        raise UnusableModelError(f"{path}: its vae is {vae_class}, not one of {', '.join(VAES)}")
    check_foreign(folder / "vae" / "config.json", read_config(folder / "vae" / "config.json"))
    parts["vae"] = getattr(diffusers, vae_class).from_pretrained(
        folder / "vae", torch_dtype=torch.float32, use_safetensors=True, local_files_only=True
    )
    scheduler_class = part_class(path, index, "scheduler")
    if scheduler_class not in _SCHEDULERS:
        raise UnusableModelError(f"{path}: its scheduler is {scheduler_class}, not one of {', '.join(_SCHEDULERS)}")
    parts["scheduler"] = getattr(diffusers, scheduler_class).from_pretrained(
        folder / "scheduler", local_files_only=True
    )
    plain = {name: value for name, value in index.items() if name == "is_distilled"}
    pipe = getattr(diffusers, class_name)(**parts, **plain)
    cut_tokenizers(pipe)
    return pipe


def read_text_parts(folder: Path, class_name: str, variant: str | None) -> dict[str, Any]:
    """Return the text encoders and tokenizers of a diffusers folder by name; None for those that it does without.

    Raises UnusableModelError as `load_family`.
    """
    path = folder / "model_index.json"
    index = read_config(path)
    _, needed, optional = FAMILY_PARTS[class_name]
    parts: dict[str, Any] = {}
    for name in (*needed, *optional):
        tokenizer = name.replace("text_encoder", "tokenizer")
        if index.get(name) in (None, [None, None]):
            if name in needed:
                raise UnusableModelError(
                    f"{path} has no {name}: concepts are found by what a text encoder makes of prompts, so that a "
                    "pipeline with precomputed embeddings alone has nothing to erase them by: give the whole model"
                )
            parts |= {name: None, tokenizer: None}
            continue
        parts[name] = _read_text_encoder(folder / name, part_class(path, index, name), variant)
        parts[tokenizer] = _read_tokenizer(folder / tokenizer, part_class(path, index, tokenizer))
    return parts


def cut_tokenizers(pipe: Any) -> None:
    """Let the tokenizers of a pipeline end where its own call does."""
    family = FAMILIES[type(pipe).__name__]
    check_padding(pipe, family)
    for source in family.sources(pipe):
        if source.rows is not None:
            tokenizer = plain_tokenizer(pipe, source.name)
            length = family.length(pipe, source.name, family.prompt_options(pipe))
            tokenizer.model_max_length = int(min(tokenizer.model_max_length, length))


def part_class(path: Path, index: dict[str, Any], name: str) -> str:
    """Return the class of a part of a pipeline. Raises UnusableModelError for one that the libraries do not have."""
    value = index.get(name)
    if not (isinstance(value, list) and len(value) == 2 and all(isinstance(each, str) for each in value)):
        raise UnusableModelError(f"{path} names no {name}: give `model` a whole diffusers folder")
    library, class_name = value
    if library not in ("diffusers", "transformers") or not hasattr(
        diffusers if library == "diffusers" else transformers, class_name
    ):
        raise UnusableModelError(
            f"{path}: its {name} is {value}, which these libraries do not know; no other code is run"
        )
    return class_name


def check_unquantised(folder: Path, config: dict[str, Any]) -> None:
    """Raise UnusableModelError for a part whose weights are quantised."""
    if config.get("quantization_config") is not None or any(folder.glob("*.gguf")):
        raise UnusableModelError(
            f"{folder} is quantised, and quantised weights are not changed: give `model` the unquantised one, or make "
            "a LoRA from that one (`format` lora) and load it beside the quantised weights"
        )


def _read_denoiser(folder: Path, found: str, wanted: str, variant: str | None) -> Any:
    if found != wanted:
        raise UnusableModelError(f"{folder.parent}: its transformer is a {found}, and its pipeline's is a {wanted}")
    config = read_config(folder / "config.json")
    check_unquantised(folder, config)
    if config.get("_class_name", wanted) != wanted:
        raise UnusableModelError(f"{folder / 'config.json'}: it is of a {config['_class_name']}, not of a {wanted}")
    check_foreign(folder / "config.json", config)
    kind = getattr(diffusers, wanted)
    with init_empty_weights():  # of which what is no weight is computed
        denoiser = kind.from_config(config)
    try:
        files = weight_files(folder, variant)[0]
        denoiser.mapped_from = file_states(files)
        tensors = map_tensors(files)
        lora = next((name for name in tensors if "lora_" in name or ".base_layer." in name), None)
        if lora is not None:
            raise UnusableModelError(f"{folder} holds a LoRA ({lora}): save it without, or fused by `fuse_lora`")
        denoiser.load_state_dict(tensors, assign=True)
    except (RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UnusableModelError(
            f"{folder}: its weights are damaged or not those of its config.json: {reason}"
        ) from error
    return denoiser


def _read_text_encoder(folder: Path, class_name: str, variant: str | None) -> Any:
    if class_name not in _TEXT_ENCODERS:
        raise UnusableModelError(f"{folder}: nothing here reads by a {class_name}, but {', '.join(_TEXT_ENCODERS)} do")
    config = read_config(folder / "config.json")
    if config.get("quantization_config") is not None:
        raise UnusableModelError(f"{folder} is quantised: give `model` one whose text encoders are not")
    check_foreign(folder / "config.json", config)
    _, own_variant = weight_files(folder, variant)
    encoder, info = getattr(transformers, class_name).from_pretrained(
        str(folder),
        variant=own_variant,
        dtype=torch.float32,
        use_safetensors=True,
        local_files_only=True,
        output_loading_info=True,
    )
    missing = sorted(str(name) for name in info["missing_keys"])
    if missing:
        raise UnusableModelError(f"{folder}: {', '.join(missing)[:200]} are missing: get the model again")
    return encoder


def _read_tokenizer(folder: Path, class_name: str) -> Any:
    if not _TOKENIZER.fullmatch(class_name):
        raise UnusableModelError(f"{folder}: {class_name} is no tokenizer")
    return getattr(transformers, class_name).from_pretrained(str(folder), local_files_only=True)
