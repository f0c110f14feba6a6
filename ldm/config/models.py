"""TODO config.models."""

from __future__ import annotations

from omegaconf import DictConfig, OmegaConf
from pathlib import Path
from ldm.diffusion.load import DEFAULT_CONFIG, load_model
from ldm.io.paths import REPO_ROOT


def load_model_config(name: str) -> DictConfig:
    """The sampling and erasure settings of a model: `configs/NAME.yaml`, else those of Stable Diffusion v1."""
    own = REPO_ROOT / "configs" / f"{name}.yaml"
    return read_model_config(own if own.is_file() else DEFAULT_CONFIG)


def read_model_config(path: Path) -> DictConfig:
    """The config at `path`, over that of the model that it `extends`, if it says so."""
    config = OmegaConf.load(path)
    return OmegaConf.merge(load_model_config(config.extends), config) if "extends" in config else config
