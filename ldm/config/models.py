"""A model's own settings: `configs/NAME.yaml` merged over the defaults of `ldm.config.methods`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ldm.config.methods import (
    METHODS,
    EditConfig,
    EvaluationConfig,
    GateConfig,
    MethodConfig,
    NullSpaceConfig,
    SamplingConfig,
    Settings,
    did_you_mean,
)
from ldm.config.yaml_files import read_mapping
from ldm.io.legacy import upgrade
from ldm.io.paths import REPO_ROOT

DEFAULT_CONFIG = REPO_ROOT / "configs" / "stable-diffusion" / "v1-inference.yaml"
_RENAMED_CONFIGS = {"mini-many": "mini-sd-logos"}
_OTHER_CONFIGS = ("concepts", "logos", "scenes", "templates")  # files of the same folder that are no model's
_MODEL_KEYS = ("base_config", "component_configs", "sampling", "null_space", "evaluation", "gate", "edit", "methods")
TRAINING_KEYS = ("seed", "dataset", "tokenizer", "text_encoder", "vae", "unet", "scheduler", "train")

AnySettings = TypeVar("AnySettings", bound=Settings)


@dataclass(frozen=True)
class ModelConfig:
    """The settings that scripts use for a model where a flag is silent."""

    sampling: SamplingConfig = SamplingConfig()
    null_space: NullSpaceConfig = NullSpaceConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    gate: GateConfig = field(default_factory=GateConfig)
    edit: EditConfig = field(default_factory=EditConfig)
    methods: Mapping[str, MethodConfig] = field(
        default_factory=lambda: {name: kind() for name, kind in METHODS.items()}
    )


def load_model_config(name: str) -> ModelConfig:
    """Return the settings of the model called `name`: `configs/NAME.yaml`, else those of Stable Diffusion v1.

    Raises ValueError, naming file and key, for a key that there is not or a value that it cannot have.
    """
    path = config_path(name)
    return make_model_config(read_yaml(path), path)


def config_path(name: str) -> Path:
    """Return the YAML file of the model called `name`, or Stable Diffusion v1's where it has none of its own."""
    path = _named_config(name)
    return DEFAULT_CONFIG if path is None else path


def _named_config(name: str) -> Path | None:
    folder = REPO_ROOT / "configs"
    path = folder / f"{_RENAMED_CONFIGS.get(name, name)}.yaml"
    try:
        is_models = path.resolve().is_relative_to(folder.resolve()) and path.is_file()
    except (OSError, ValueError):  # no file can be called so
        return None
    return path if is_models and name not in _OTHER_CONFIGS else None


def make_model_config(config: DictConfig, path: Path) -> ModelConfig:
    """Return the settings in what `read_yaml` read from `path`. Raises ValueError as `load_model_config`."""
    for key in config:
        if key not in (*_MODEL_KEYS, *TRAINING_KEYS):
            raise ValueError(f"{path}: no key {key}{did_you_mean(str(key), [*_MODEL_KEYS, *TRAINING_KEYS])}")
    methods = config.get("methods", {})
    for name in methods:
        if name not in METHODS:
            raise ValueError(f"{path}, methods: no method {name}{did_you_mean(str(name), list(METHODS))}")
    return ModelConfig(
        _merged(SamplingConfig, config.get("sampling", {}), path, "sampling"),
        _merged(NullSpaceConfig, config.get("null_space", {}), path, "null_space"),
        _merged(EvaluationConfig, config.get("evaluation", {}), path, "evaluation"),
        _merged(GateConfig, config.get("gate", {}), path, "gate"),
        _merged(EditConfig, config.get("edit", {}), path, "edit"),
        {name: _merged(kind, methods.get(name, {}), path, f"methods, {name}") for name, kind in METHODS.items()},
    )


def _merged(kind: type[AnySettings], changes: Any, path: Path, section: str) -> AnySettings:
    try:
        settings: Any = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(kind), changes))
    except (OmegaConfBaseException, TypeError, ValueError) as error:
        raise ValueError(f"{path}, {section}: {str(error).splitlines()[0]}") from error
    return settings


def read_yaml(path: Path, seen: tuple[Path, ...] = ()) -> DictConfig:
    """Return the config at `path`, with today's keys, over that of the model that its `base_config` names.

    `seen` are the configs that led here. Raises ValueError when one cannot be read, is no mapping, or leads back to
    itself.
    """
    config = OmegaConf.create(upgrade(read_mapping(path)))
    if "base_config" not in config:
        return config
    base = _named_config(str(config.base_config))
    if base is None:
        names = [found.stem for found in (REPO_ROOT / "configs").glob("*.yaml") if found.stem not in _OTHER_CONFIGS]
        near = did_you_mean(str(config.base_config), names)
        raise ValueError(f"{path}: base_config {config.base_config} is no model's file in the folder configs{near}")
    seen = (*seen, path.resolve())
    if base.resolve() in seen:
        raise ValueError(f"{path}: its base_config {config.base_config} leads back to itself")
    return DictConfig(OmegaConf.merge(read_yaml(base, seen), config))
