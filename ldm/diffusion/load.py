"""TODO diffusion.load."""

from __future__ import annotations

from diffusers import DiffusionPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.utils import logging as diffusers_logging
import json
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pathlib import Path
from safetensors import SafetensorError, safe_open
import torch
from torch import nn
from transformers.utils import logging as transformers_logging
from yaml import YAMLError
from ldm.diffusion.compvis import CHECKPOINT_SUFFIXES, load_compvis_state_dict, stub_lightning_callbacks
from ldm.diffusion.model import DiffusionModel
from ldm.io.files import METADATA_FILE
from ldm.io.paths import REPO_ROOT


SUPPORTED_PIPELINES = {kind.__name__: kind for kind in (StableDiffusionPipeline, StableDiffusionXLPipeline)}


DEFAULT_CONFIG = REPO_ROOT / "configs" / "stable-diffusion" / "v1-inference.yaml"


def load_model(source: str | Path, device: torch.device, config: str | Path | None = None,
         dtype: torch.dtype = torch.float32) -> DiffusionModel:
    """Open a model with its U-Net in `dtype`: a diffusers folder of Stable Diffusion 1.x, 2.x or XL, a hub id of one where a
    hub can be reached, or a checkpoint of Stable Diffusion 1.x in CompVis' layout (.ckpt, .safetensors).

    `config` says for a checkpoint what it is made of: a file of `configs/` (its `components` is a folder of diffusers
    configs), or CompVis' own v1-inference.yaml; by default Stable Diffusion v1. No code from `source` is ever run.
    Raises ValueError when `source` is no such model, is damaged, or holds NaN or infinity.
    """
    silence_hf_logging()
    single = Path(source).suffix in CHECKPOINT_SUFFIXES
    if single:
        load_compvis_state_dict(Path(source))  # refuses what would run code, before anything else looks at it
    try:
        pipeline = _from_checkpoint(Path(source), config) if single else _from_folder(source)
    except (OSError, ValueError, LookupError, AttributeError, TypeError, RuntimeError, SafetensorError) as error:
        what = "a Stable Diffusion v1 checkpoint (.ckpt or .safetensors)" if single else \
            "a diffusers folder (or a hub id, with a network)"
        raise ValueError(f"cannot load a model from '{source}': pass {'--ckpt_path' if single else '--model'} the path of {what}: "
                         f"{' '.join(str(error).split())[:300]}") from error
    if pipeline.scheduler.config.get("prediction_type", "epsilon") not in ("epsilon", "v_prediction"):
        raise ValueError(f"{source} predicts '{pipeline.scheduler.config.prediction_type}', and this version erases only from "
                         "models that predict the noise (epsilon) or the velocity (v_prediction)")
    for part in pipeline.components.values():
        _check_weights(part, source)
    return DiffusionModel(*resolve_names(source, config), pipeline, device, dtype, Path(source) if single else None)


def silence_hf_logging() -> None:
    """diffusers and transformers say only what went wrong: progress is shown above them."""
    for logging in (diffusers_logging, transformers_logging):
        logging.set_verbosity_error()
        logging.disable_progress_bar()


def resolve_names(source: str | Path, config: str | Path | None = None) -> tuple[str, str]:
    """What a model is called, and whose settings it takes: its own, those of the model that it was merged from, or those of
    its config."""
    path = Path(source)
    if path.suffix in CHECKPOINT_SUFFIXES:
        return path.stem, Path(config).stem if config else path.stem
    if not path.is_dir():
        return (str(source).replace("/", "--"),) * 2
    recipe, name = path / METADATA_FILE, path.resolve().name
    try:
        return name, Path(json.loads(recipe.read_text()).get("base", name)).name if recipe.is_file() else name
    except (ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"{recipe} is not what Merge_model.py writes: remove it, or merge again") from error


def resolve_config_dir(source: str | Path, config: str | Path | None = None) -> Path:
    """The folder with the configs of a model's parts: of a checkpoint the one that its config names.

    Raises ValueError for a config that cannot be read, OSError for a hub id that cannot be reached.
    """
    if Path(source).suffix not in CHECKPOINT_SUFFIXES:
        return Path(source) if Path(source).is_dir() else Path(DiffusionPipeline.download(str(source), use_safetensors=True))
    place = Path(config) if config else DEFAULT_CONFIG
    try:
        components = OmegaConf.load(place).get("components", "v1")
    except (OSError, OmegaConfBaseException, YAMLError, AttributeError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read --config_path {place}: pass {DEFAULT_CONFIG.relative_to(REPO_ROOT)}") from error
    return DEFAULT_CONFIG.parent / components if components == "v1" else place.parent / str(components)


def _from_folder(source: str | Path) -> DiffusionPipeline:
    folder = resolve_config_dir(source)
    index = json.loads((folder / "model_index.json").read_text())
    kind = SUPPORTED_PIPELINES.get(index.get("_class_name"))
    if kind is None:
        raise ValueError(f"its pipeline is {index.get('_class_name')}, not one of {', '.join(SUPPORTED_PIPELINES)}")
    ours = {name: made_by for name, made_by in index.items() if name in ("unet", "vae", "scheduler") or "text_encoder" in name
            or "tokenizer" in name}
    foreign = [name for name, (library, _) in ours.items() if library not in ("diffusers", "transformers")]
    if foreign:
        raise ValueError(f"its {foreign[0]} asks for code from outside diffusers and transformers, which is not run")
    given = {name: None for name in ("safety_checker", "feature_extractor", "image_encoder") if name in index}
    if (weights := folder / "unet" / "diffusion_pytorch_model.safetensors").is_file():
        given["unet"] = _read_unet(folder, weights)
    return kind.from_pretrained(str(folder), dtype=torch.float32, use_safetensors=True, **given)


def _read_unet(folder: Path, weights: Path) -> UNet2DConditionModel:
    """The U-Net, read tensor by tensor. Mapped from the file, as diffusers reads it, it would stay in memory twice until it is
    wholly rounded or laid out anew."""
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(str(folder), subfolder="unet"))
    with safe_open(weights, framework="pt", backend="pread") as opened:
        unet.load_state_dict({name: opened.get_tensor(name).float() for name in opened.keys()}, assign=True)
    return unet


def _from_checkpoint(path: Path, config: str | Path | None) -> StableDiffusionPipeline:
    with stub_lightning_callbacks():
        return StableDiffusionPipeline.from_single_file(
            str(path), config=str(resolve_config_dir(path, config)), local_files_only=True, dtype=torch.float32, safety_checker=None,
            feature_extractor=None, image_encoder=None, requires_safety_checker=False)


def _check_weights(part: object, source: str | Path) -> None:
    for name, weight in part.named_parameters() if isinstance(part, nn.Module) else ():
        if weight.is_meta:
            raise ValueError(f"{source} lacks {name} of its {type(part).__name__}: get the whole model")
        if not weight.isfinite().all():
            raise ValueError(f"{source}: {name} of its {type(part).__name__} holds NaN or infinity: get the model again")


def save_pipeline(model: DiffusionModel, folder: Path) -> None:
    """Write the model, as its weights stand now, as a diffusers folder in its own precision."""
    model.pipeline.save_pretrained(folder, safe_serialization=True)
