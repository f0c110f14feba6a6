"""Load a model from a diffusers folder, a hub or a CompVis checkpoint, without running code from it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.utils import logging as diffusers_logging
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers.utils import logging as transformers_logging
from yaml import YAMLError

from ldm.config.models import DEFAULT_CONFIG
from ldm.diffusion.compvis import CHECKPOINT_SUFFIXES, load_compvis_state_dict, stub_lightning_callbacks
from ldm.diffusion.model import DiffusionModel
from ldm.io.files import find_metadata_file, read_dir_metadata
from ldm.io.legacy import upgrade
from ldm.io.paths import REPO_ROOT

Pipeline = StableDiffusionPipeline | StableDiffusionXLPipeline
SUPPORTED_PIPELINES: dict[str, type[Pipeline]] = {
    pipeline_class.__name__: pipeline_class for pipeline_class in (StableDiffusionPipeline, StableDiffusionXLPipeline)
}


def load_model(
    source: str | Path,
    device: torch.device | None = None,
    config: str | Path | None = None,
    dtype: torch.dtype = torch.float32,
) -> DiffusionModel:
    """Load a model onto `device`, or else the machine's accelerator or CPU, its U-Net in `dtype`.

    `source` is a diffusers folder of Stable Diffusion 1.x, 2.x or XL, a hub id of one where a hub can be reached, or
    a checkpoint of Stable Diffusion 1.x in CompVis' layout (.ckpt, .safetensors). For a checkpoint `config` says what
    it is made of: a file of `configs/` (its `component_configs` is a folder of diffusers configs), or CompVis' own
    v1-inference.yaml; by default Stable Diffusion v1. No code from `source` is ever run.
    Raises ValueError when `source` is no such model, is damaged, or holds NaN or infinity.
    """
    silence_hf_logging()
    device = device or torch.accelerator.current_accelerator(check_available=True) or torch.get_default_device()
    is_checkpoint = Path(source).suffix in CHECKPOINT_SUFFIXES
    if is_checkpoint:
        load_compvis_state_dict(Path(source))  # refuses what would run code, before anything else looks at it
    try:
        pipeline = _load_checkpoint(Path(source), config) if is_checkpoint else _load_folder(source)
    except (OSError, ValueError, LookupError, AttributeError, TypeError, RuntimeError, SafetensorError) as error:
        if is_checkpoint:
            advice = "give `ckpt_path` the path of a Stable Diffusion v1 checkpoint (.ckpt or .safetensors)"
        else:
            advice = "give `model` the path of a diffusers folder (or a hub id, with a network)"
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"cannot load a model from '{source}': {advice}: {reason}") from error
    prediction_type = pipeline.scheduler.config.get("prediction_type", "epsilon")
    if prediction_type not in ("epsilon", "v_prediction"):
        raise ValueError(
            f"{source} predicts '{prediction_type}', and this version erases only from models that predict the noise "
            "(epsilon) or the velocity (v_prediction)"
        )
    for component in pipeline.components.values():
        if isinstance(component, nn.Module):
            _check_weights(component, source)
    name, config_name = resolve_names(source, config)
    return DiffusionModel(name, config_name, pipeline, device, dtype, Path(source) if is_checkpoint else None)


def silence_hf_logging() -> None:
    """Let diffusers and transformers report errors alone, without progress bars of their own."""
    for logging in (diffusers_logging, transformers_logging):
        logging.set_verbosity_error()
        logging.disable_progress_bar()


def resolve_names(source: str | Path, config: str | Path | None = None) -> tuple[str, str]:
    """Return what a model is called, and the name of the model whose settings it takes.

    The settings are its own, those of the model that it was merged from, or those of its config.
    Raises ValueError when a folder's metadata cannot be read.
    """
    path = Path(source)
    if path.suffix in CHECKPOINT_SUFFIXES:
        return path.stem, Path(config).stem if config else path.stem
    if not path.is_dir():
        name = str(source).replace("/", "--")
        return name, name
    name = path.resolve().name
    try:
        return name, Path(read_dir_metadata(path).get("base_model", name)).name
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{find_metadata_file(path)} is not the metadata of a merged model: remove it, or merge again"
        ) from error


def resolve_config_dir(source: str | Path, config: str | Path | None = None) -> Path:
    """Return the folder with the configs of a model's components: of a checkpoint the one that its config names.

    Raises ValueError for a config that cannot be read, OSError for a hub id that cannot be reached.
    """
    path = Path(source)
    if path.suffix not in CHECKPOINT_SUFFIXES:
        return path if path.is_dir() else Path(DiffusionPipeline.download(str(source), use_safetensors=True))
    config_path = Path(config) if config else DEFAULT_CONFIG
    try:
        content: Any = upgrade(OmegaConf.to_container(OmegaConf.load(config_path)))
        component_configs = content.get("component_configs", "v1")  # CompVis' own config has no such key
    except (OSError, OmegaConfBaseException, YAMLError, AttributeError, TypeError, UnicodeDecodeError) as error:
        advice = f"give `config_path` {DEFAULT_CONFIG.relative_to(REPO_ROOT)}"
        raise ValueError(f"cannot read the config {config_path}: {advice}") from error
    folder = DEFAULT_CONFIG.parent if component_configs == "v1" else config_path.parent
    return folder / str(component_configs)


def _load_folder(source: str | Path) -> Pipeline:
    folder = resolve_config_dir(source)
    index: dict[str, Any] = json.loads((folder / "model_index.json").read_text())
    class_name = index.get("_class_name", "")
    pipeline_class = SUPPORTED_PIPELINES.get(class_name)
    if pipeline_class is None:
        raise ValueError(f"its pipeline is {class_name}, not one of {', '.join(SUPPORTED_PIPELINES)}")
    for name, value in index.items():
        if name in ("unet", "vae", "scheduler") or "text_encoder" in name or "tokenizer" in name:
            library, _ = value
            if library not in ("diffusers", "transformers"):
                raise ValueError(f"its {name} asks for code from outside diffusers and transformers, which is not run")
    components: dict[str, Any] = {}
    for name in ("safety_checker", "feature_extractor", "image_encoder"):
        if name in index:
            components[name] = None
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    if weights.is_file():
        components["unet"] = _read_unet(folder, weights)
    return pipeline_class.from_pretrained(str(folder), dtype=torch.float32, use_safetensors=True, **components)


def _read_unet(folder: Path, weights: Path) -> UNet2DConditionModel:
    """Read the U-Net tensor by tensor.

    Mapped from the file, as diffusers reads it, it would stay in memory twice until wholly rounded or laid out anew.
    """
    config: Any = UNet2DConditionModel.load_config(str(folder), subfolder="unet")
    with torch.device("meta"):
        unet: Any = UNet2DConditionModel.from_config(config)
    with safe_open(weights, framework="pt", backend="pread") as opened:
        names: list[str] = opened.keys()
        unet.load_state_dict({name: opened.get_tensor(name).float() for name in names}, assign=True)
    return unet


def _load_checkpoint(path: Path, config: str | Path | None) -> StableDiffusionPipeline:
    with stub_lightning_callbacks():
        return StableDiffusionPipeline.from_single_file(
            str(path),
            config=str(resolve_config_dir(path, config)),
            local_files_only=True,
            dtype=torch.float32,
            safety_checker=None,
            feature_extractor=None,
            image_encoder=None,
            requires_safety_checker=False,
        )


def _check_weights(module: nn.Module, source: str | Path) -> None:
    """Raise ValueError when a weight of the module is missing or not finite."""
    for name, weight in module.named_parameters():
        if weight.is_meta:
            raise ValueError(f"{source} lacks {name} of its {type(module).__name__}: get the whole model")
        if not weight.isfinite().all():
            raise ValueError(
                f"{source}: {name} of its {type(module).__name__} holds NaN or infinity: get the model again"
            )


def save_pipeline(model: DiffusionModel, folder: Path) -> None:
    """Write the model, as its weights stand now, as a diffusers folder in its own precision."""
    model.pipeline.save_pretrained(folder, safe_serialization=True)
