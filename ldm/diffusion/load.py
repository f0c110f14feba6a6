"""Load a model from a diffusers folder, a hub or a CompVis checkpoint, without running code from it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.utils import logging as diffusers_logging
from safetensors import SafetensorError
from torch import nn
from transformers import BertModel, CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection
from transformers.utils import logging as transformers_logging

from ldm.config.models import DEFAULT_CONFIG, SettingsSource, bundled_settings, component_dir, named_settings
from ldm.config.yaml_files import read_mapping
from ldm.diffusion.components import (
    OPTIONAL_PARTS,
    WHOLE_MODEL,
    UnusableModelError,
    check_configs,
    check_index,
    class_of,
    read_config,
)
from ldm.diffusion.compvis import (
    CHECKPOINT_SUFFIXES,
    LAYER_PREFIXES,
    convert_to_compvis,
    load_compvis_state_dict,
    named_by_content,
    stub_lightning_callbacks,
)
from ldm.diffusion.consistency import check_parts
from ldm.diffusion.families import FAMILIES
from ldm.diffusion.load_family import FAMILY_PARTS, load_family
from ldm.diffusion.model import DiffusionModel, common_dtype
from ldm.diffusion.weights import download, read_tensors, variants_of, weight_files
from ldm.io.errors import notify
from ldm.io.files import (
    SETTINGS_FILE,
    changed_files,
    find_metadata_file,
    is_damaged,
    read_dir_metadata,
    unlisted_files,
)
from ldm.io.legacy import upgrade
from ldm.io.paths import REPO_ROOT

Pipeline = StableDiffusionPipeline | StableDiffusionXLPipeline
SUPPORTED_PIPELINES: dict[str, type[Pipeline]] = {
    pipeline_class.__name__: pipeline_class for pipeline_class in (StableDiffusionPipeline, StableDiffusionXLPipeline)
}
_PARTS: dict[str, Any] = {
    "vae": AutoencoderKL,
    "text_encoder": None,  # of one of the classes of TEXT_ENCODERS
    "text_encoder_2": CLIPTextModelWithProjection,
}
TEXT_ENCODERS: dict[str, Any] = {"CLIPTextModel": CLIPTextModel, "BertModel": BertModel}


def load_model(
    source: str | Path,
    device: torch.device | None = None,
    config: str | Path | None = None,
    dtype: torch.dtype | None = torch.float32,
    variant: str | None = None,
) -> DiffusionModel:
    """Load a model onto `device`, or else the machine's accelerator or CPU, its denoiser in `dtype`.

    None is the dtype in which it is read: of a U-Net float32, of a transformer that of its files. In that dtype a
    transformer on the CPU is mapped from its files, and may be larger than the memory.

    `source` is a diffusers folder of a known family, a hub id of one where a hub can be reached, or
    a checkpoint of Stable Diffusion 1.x in CompVis' layout: a file, pickled or safetensors, whatever it is called. For
    a checkpoint `config` says what it is made of: a file of `configs/` (its `component_configs` is a folder of
    diffusers configs), or CompVis' own v1-inference.yaml; by default Stable Diffusion v1. Of a folder's weights those
    of `variant`, such as fp16, are read where it has such. No code from `source` is ever run.
    Raises ValueError when `source` is no such model, is damaged, holds NaN or infinity, or says in its configs what is
    not computed here.
    """
    silence_hf_logging()
    device = device or torch.accelerator.current_accelerator(check_available=True) or torch.get_default_device()
    from_checkpoint = is_checkpoint(source)
    if str(source).lower().endswith(".gguf"):
        raise UnusableModelError(
            f"{source} is quantised, and quantised weights are not changed: give `model` a diffusers folder of the "
            "unquantised model, and load a LoRA made from that (`format` lora) beside the quantised one"
        )
    if from_checkpoint and variant is not None:
        raise ValueError(f"`variant` {variant} is one of a diffusers folder, and {source} is a checkpoint")
    name, config_name = resolve_names(source, config)
    if from_checkpoint and is_damaged(Path(source)):  # of an export
        raise ValueError(f"{source} is not as it was written: export it again")
    # refuses what would run code, before anything else looks at it
    names = set(load_compvis_state_dict(Path(source))) if from_checkpoint else set[str]()
    try:
        checkpoint = Path(source) if from_checkpoint else None
        pipeline = _load_checkpoint(checkpoint, names, config) if checkpoint else _load_folder(source, variant)
        if isinstance(pipeline, (StableDiffusionPipeline, StableDiffusionXLPipeline)):
            check_parts(pipeline, source)
    except (UnusableModelError, MemoryError, torch.OutOfMemoryError):
        raise
    # What the libraries raise for a file that means harm has no end: their own kinds, KeyError, ZeroDivisionError,
    # RecursionError, AssertionError, ImportError for packages that a config asks for; and Rust's tokenizers nothing
    # but Exception.
    except Exception as error:
        if from_checkpoint:
            advice = "give `ckpt_path` the path of a Stable Diffusion v1 checkpoint (.ckpt or .safetensors)"
        else:
            advice = "give `model` the path of a diffusers folder (or a hub id, with a network)"
        reason = " ".join(str(error).split())[:300]
        kind = "" if isinstance(error, (OSError, ValueError, RuntimeError)) else f"{type(error).__name__}: "
        raise ValueError(f"cannot load a model from '{source}': {advice}: {kind}{reason}") from error
    family = FAMILIES[type(pipeline).__name__]
    prediction_type = "epsilon" if family.is_flow else pipeline.scheduler.config.get("prediction_type", "epsilon")
    if prediction_type not in ("epsilon", "v_prediction"):
        raise ValueError(
            f"{source} predicts '{prediction_type}', and this version erases only from models that predict the noise "
            "(epsilon) or the velocity (v_prediction)"
        )
    for component in pipeline.components.values():
        if isinstance(component, nn.Module):
            check_weights(component, source)
    model = DiffusionModel(
        name,
        config_name,
        pipeline,
        device,
        dtype or common_dtype(getattr(pipeline, family.denoiser)),
        checkpoint=checkpoint,
        settings_path=find_settings(source, config),
    )
    _try_parts(model, source)
    return model


@torch.no_grad()
def _try_parts(model: DiffusionModel, source: str | Path) -> None:
    """Run each part once on the smallest input. Raises ValueError where its config lets none of it be computed."""
    latents = torch.zeros(1, *model.adapter.narrow_shape(model.denoiser.config), device=model.device)
    try:
        embeds = model.encode_prompt([""])
        output = model.denoiser_output(latents, torch.zeros((), device=model.device), embeds)
        finite = {"text encoder": embeds, "denoiser": output, "autoencoder": model.decode(output)}
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # of any kind: what its config says is wrong for one of the libraries' layers
        reason = " ".join(str(error).split())[:300]
        how = f"on {model.device} in {model.dtype}"
        raise ValueError(f"{source} loads, and cannot be used {how} as its configs are: {reason}") from error
    for part, output in finite.items():
        if not output.isfinite().all():
            raise ValueError(f"the {part} of {source} makes NaN or infinity in {model.dtype}: see its config.json")


def is_checkpoint(source: str | Path) -> bool:
    """Return whether a model is given as a single file; what is missing counts by what it is called."""
    path = Path(source)
    try:
        return path.is_file() or (path.suffix.lower() in CHECKPOINT_SUFFIXES and not path.is_dir())
    except OSError:  # no file can be called so
        return False


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:  # no folder can be called so
        return False


def silence_hf_logging() -> None:
    """Let diffusers and transformers report errors alone, without progress bars of their own."""
    for logging in (diffusers_logging, transformers_logging):
        logging.set_verbosity_error()
        logging.disable_progress_bar()


def resolve_names(source: str | Path, config: str | Path | None = None) -> tuple[str, str]:
    """Return what a model is called, and what exports call their base.

    That is the model itself, the one that it was merged from, or for a checkpoint its config.
    Raises ValueError when a folder's metadata cannot be read.
    """
    path = Path(source)
    if is_checkpoint(path):
        name = path.stem if path.suffix.lower() in CHECKPOINT_SUFFIXES else path.name
        return name, Path(config).stem if config else name
    if not _is_folder(path):
        name = str(source).replace("/", "--")
        return name, name
    name = path.resolve().name
    try:
        return name, Path(read_dir_metadata(path).get("base_model", name)).name
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{find_metadata_file(path)} is not the metadata of a merged model: remove it, or merge again"
        ) from error


def settings_source(source: str | Path, config: str | Path | None = None, variant: str | None = None) -> SettingsSource:
    """Return what decides the settings of a model, without loading it; raises as `resolve_config_dir`."""
    index = read_config(resolve_config_dir(source, config, variant) / "model_index.json")
    return SettingsSource(str(index.get("_class_name")), find_settings(source, config))


def find_settings(source: str | Path, config: str | Path | None = None) -> Path | None:
    """Return the file with a model's own settings, which stand over those of its family; None where it has none.

    In a model's folder that is `srs-me.yaml`, and for a checkpoint it is `config`. A model that an older version merged
    or trained has the settings of the bundled model that its metadata names. By the model's name alone a file
    `configs/NAME.yaml` is found as older versions did, with a notice unless it is a hub id, which has no folder.
    """
    path = Path(source)
    _, config_name = resolve_names(source, config)
    if is_checkpoint(path):
        return Path(config) if config else named_settings(config_name, "give it as `config_path`")
    if not _is_folder(path):
        return named_settings(config_name, "")
    own = path / SETTINGS_FILE
    if own.is_file():
        return own
    bundled = bundled_settings(config_name) if "base_model" in read_dir_metadata(path) else None
    return bundled or named_settings(config_name, f"move it to {own}")


def resolve_config_dir(source: str | Path, config: str | Path | None = None, variant: str | None = None) -> Path:
    """Return the folder with the configs of a model's components: of a checkpoint the one that its config names.

    That is relative to the config, and may lie anywhere: the config is the user's own file, as the folder is.
    Raises UnusableModelError for a config that cannot be read, a folder that is not there, and a hub id that cannot be
    reached.
    """
    path = Path(source)
    if not is_checkpoint(path):
        return path if _is_folder(path) else download(str(source), variant)
    config_path = Path(config) if config else DEFAULT_CONFIG
    try:
        return component_dir(config_path, upgrade(read_mapping(config_path)))
    except ValueError as error:
        advice = f"give `config_path` {DEFAULT_CONFIG.relative_to(REPO_ROOT)}"
        raise UnusableModelError(f"cannot read the config {config_path}: {advice}: {error}") from error


def _check_configs(folder: Path) -> type[Pipeline]:
    """Return the pipeline class of a diffusers folder. Raises UnusableModelError for a config that is not followed."""
    path = folder / "model_index.json"
    index = read_config(path)
    class_name = str(index.get("_class_name"))
    pipeline_class = SUPPORTED_PIPELINES.get(class_name)
    if pipeline_class is None:
        raise UnusableModelError(
            f"{path}: its pipeline is {class_name}, not one of {', '.join(FAMILIES)}: {WHOLE_MODEL}"
        )
    is_xl = pipeline_class is StableDiffusionXLPipeline
    check_index(path, index, is_xl)
    check_configs(folder, is_xl)
    return pipeline_class


def _load_folder(source: str | Path, variant: str | None) -> Any:
    if variant is not None and not re.fullmatch(r"\w+", variant):
        raise UnusableModelError(f"`variant` '{variant}' is no name such as fp16")
    folder = resolve_config_dir(source, variant=variant)
    class_name = str(read_config(folder / "model_index.json").get("_class_name"))
    pipeline_class = None if class_name in FAMILY_PARTS else _check_configs(folder)
    metadata = read_dir_metadata(folder)
    if "merged" in metadata and "files" not in metadata:
        notify(
            f"{folder} was exported by an older version, without digests of its files: if they are intact is unknown"
        )
    changed = changed_files(folder)  # of what this program exported
    if changed:
        raise UnusableModelError(f"{folder} is not as it was written ({changed[0]}): export it again")
    added = unlisted_files(folder)
    if added:
        raise UnusableModelError(f"{folder} has a file that its export did not write ({added[0]}): remove it")
    names = [name for name in ("unet", "transformer", *_PARTS) if (folder / name).is_dir()]
    variants = sorted({found for name in names for found in variants_of(folder / name)})
    if variant is not None and variant not in variants:
        known = f"choose from {', '.join(variants)}, or leave it out" if variants else "leave it out"
        raise UnusableModelError(f"{folder} has no weights of the `variant` {variant}: {known}")
    if pipeline_class is None:
        return load_family(folder, class_name, variant)
    components: dict[str, Any] = dict.fromkeys(OPTIONAL_PARTS)
    components["unet"] = _read_unet(folder / "unet", variant)
    for name, kind in _PARTS.items():
        if name != "text_encoder_2" or pipeline_class is StableDiffusionXLPipeline:
            part_kind = kind or TEXT_ENCODERS[class_of(folder, name)]
            components[name] = load_part(part_kind, folder / name, variant)
    return pipeline_class.from_pretrained(str(folder), dtype=torch.float32, local_files_only=True, **components)


def _read_unet(folder: Path, variant: str | None) -> UNet2DConditionModel:
    config: Any = UNet2DConditionModel.load_config(str(folder))
    with torch.device("meta"):
        unet: Any = UNet2DConditionModel.from_config(config)
    try:
        unet.load_state_dict(read_tensors(weight_files(folder, variant)[0]), assign=True)
    except (RuntimeError, SafetensorError) as error:
        raise _not_fitting(folder, " ".join(str(error).split())[:300]) from error
    return unet


def _not_fitting(folder: Path, reason: object) -> UnusableModelError:
    return UnusableModelError(
        f"{folder}: its weights are damaged or not those that its config.json describes: {reason}; {WHOLE_MODEL}"
    )


def load_part(kind: Any, folder: Path, variant: str | None) -> nn.Module:
    """Return a part as its library reads it.

    Raises UnusableModelError for weights that are missing, which the library would fill at random, or left over.
    """
    _, own_variant = weight_files(folder, variant)
    part, info = kind.from_pretrained(
        str(folder),
        variant=own_variant,
        dtype=torch.float32,
        use_safetensors=True,
        local_files_only=True,
        output_loading_info=True,
        ignore_mismatched_sizes=kind is not AutoencoderKL,  # which names them itself
    )
    for key, fault in (("missing_keys", "are missing"), ("mismatched_keys", "are of another shape")):
        names = sorted(str(name) for name in info[key])
        if names:
            raise _not_fitting(folder, f"{', '.join(names)[:200]} {fault}")
    for name in sorted(info["unexpected_keys"]):
        if re.search(r"(^|\.)(encoder|decoder|embeddings|quant_conv|post_quant_conv)\.", name) and not name.endswith(
            "position_ids"
        ):
            raise _not_fitting(folder, f"{name} is one too many")
    return part


def _check_names(path: Path, names: set[str], folder: Path) -> None:
    """Raise UnusableModelError unless a checkpoint has all tensors of the parts in `folder`, and no layers beside."""
    unet_config: Any = UNet2DConditionModel.load_config(folder / "unet")
    vae_config: Any = AutoencoderKL.load_config(folder / "vae")
    with torch.device("meta"):
        unet: Any = UNet2DConditionModel.from_config(unet_config)
        vae: Any = AutoencoderKL.from_config(vae_config)
        encoder = CLIPTextModel(CLIPTextConfig.from_pretrained(folder / "text_encoder"))
    expected = convert_to_compvis(unet.state_dict(), vae.state_dict(), encoder.state_dict())
    needed = {name for name in expected if not name.endswith("position_ids")}
    for name in sorted(needed - names):
        raise UnusableModelError(f"{path} lacks {name}, which {folder} describes: give `ckpt_path` a whole checkpoint")
    for name in sorted(names - needed):
        if name.startswith(LAYER_PREFIXES):
            raise UnusableModelError(
                f"{path} has {name}, for which {folder} has no place: give `config_path` the config of this checkpoint"
            )


def _load_checkpoint(path: Path, names: set[str], config: str | Path | None) -> StableDiffusionPipeline:
    folder = resolve_config_dir(path, config)
    if _check_configs(folder) is not StableDiffusionPipeline:
        raise UnusableModelError(f"{folder} is not of Stable Diffusion v1, of which alone checkpoints are read")
    _check_names(path, names, folder)
    with stub_lightning_callbacks(), named_by_content(path) as named:
        return StableDiffusionPipeline.from_single_file(
            str(named),
            config=str(folder),
            local_files_only=True,
            dtype=torch.float32,
            safety_checker=None,
            feature_extractor=None,
            image_encoder=None,
            requires_safety_checker=False,
        )


def check_weights(module: nn.Module, source: str | Path) -> None:
    """Raise ValueError when a weight of the module is missing or not finite."""
    for name, weight in module.named_parameters():
        if weight.is_meta:
            raise ValueError(f"{source} lacks {name} of its {type(module).__name__}: get the whole model")
        if not weight.isfinite().all():
            raise ValueError(
                f"{source}: {name} of its {type(module).__name__} holds NaN or infinity: get the model again"
            )


def save_pipeline(model: DiffusionModel, folder: Path) -> None:
    """Write the model, as its weights stand now, as a diffusers folder in its own precision.

    Where its parts came from, which diffusers writes down, is left out: paths of this machine. A text encoder's config
    asks for float32, as diffusers loads other parts where no dtype is asked for.
    """
    model.pipeline.save_pretrained(folder, safe_serialization=True)
    for path in folder.rglob("*.json"):
        written = json.loads(path.read_text(encoding="utf-8"))
        content = {name: value for name, value in written.items() if name != "_name_or_path"}
        if path.name == "config.json" and "dtype" in content:
            content["dtype"] = "float32"
        if content != written:
            path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
