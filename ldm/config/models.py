"""A model's own settings, which follow from what it is: over the defaults of `ldm.config.methods` those of its family,
and over these the file that its folder carries.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

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
    SRSMEConfig,
)
from ldm.config.settings import Settings, did_you_mean
from ldm.config.yaml_files import read_mapping
from ldm.io.errors import notify
from ldm.io.files import SETTINGS_FILE, write_text
from ldm.io.legacy import upgrade
from ldm.io.paths import REPO_ROOT

DEFAULT_CONFIG = REPO_ROOT / "configs" / "stable-diffusion" / "v1-inference.yaml"
# The file of each family, by the pipeline's class as model_index.json names it. A new family is one row.
_OF_FAMILIES = REPO_ROOT / "configs" / "families"
FAMILIES = {
    "StableDiffusionPipeline": DEFAULT_CONFIG,
    "StableDiffusionXLPipeline": DEFAULT_CONFIG,
    "StableDiffusion3Pipeline": _OF_FAMILIES / "stable-diffusion-3.yaml",
    "FluxPipeline": _OF_FAMILIES / "flux.yaml",
    "PixArtAlphaPipeline": _OF_FAMILIES / "pixart.yaml",
    "PixArtSigmaPipeline": _OF_FAMILIES / "pixart.yaml",
    "SanaPipeline": _OF_FAMILIES / "sana.yaml",
    "AuraFlowPipeline": _OF_FAMILIES / "auraflow.yaml",
    "Flux2Pipeline": _OF_FAMILIES / "flux2.yaml",
    "Flux2KleinPipeline": _OF_FAMILIES / "flux2.yaml",
    "Lumina2Pipeline": _OF_FAMILIES / "lumina2.yaml",
}
BUNDLED_MODELS = ("mini-sd", "mini-sd-logos", "mini-sd-minilm", "mini-flux")
_RENAMED_MODELS = {"mini-many": "mini-sd-logos"}
_OTHER_CONFIGS = ("concepts", "logos", "scenes", "templates")  # files of the same folder that are no model's
_SECTIONS = ("sampling", "null_space", "evaluation", "gate", "edit")
_MODEL_KEYS = ("base_config", "component_configs", *_SECTIONS, "methods")
TRAINING_KEYS = ("seed", "dataset", "tokenizer", "text_encoder", "vae", "unet", "scheduler", "train")
FLOW_KEYS = ("seed", "dataset", "tokenizer", "transformer", "train")  # of a model of the FLUX architecture
_ALL_KEYS = tuple(dict.fromkeys((*_MODEL_KEYS, *TRAINING_KEYS, *FLOW_KEYS)))
_CARRIED_KEYS = ("seed", "dataset", *_SECTIONS, "methods")  # what a model's folder carries of a config
LEARNING_SETTINGS = {"lr", "stop_threshold", "l1_weight", "max_steps"}  # which ask SRS-ME to learn

AnySettings = TypeVar("AnySettings", bound=Settings)
_Layer = tuple[Path, dict[str, Any]]  # a file, and what it says under today's keys


class ConfiguredModel(Protocol):
    """What decides a model's settings: its family, and the file with its own, if it has one."""

    @property
    def family(self) -> str: ...

    @property
    def settings_path(self) -> Path | None: ...


@dataclass(frozen=True)
class SettingsSource:
    """What decides the settings of a model that is not loaded."""

    family: str
    settings_path: Path | None = None


@dataclass(frozen=True)
class ModelConfig:
    """The settings that scripts use for a model where a flag is silent.

    `sources` has the file that says a setting, by section and name, such as `methods.SRS-ME.lr`; what no file says is
    the default.
    """

    sampling: SamplingConfig = SamplingConfig()
    null_space: NullSpaceConfig = NullSpaceConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    gate: GateConfig = field(default_factory=GateConfig)
    edit: EditConfig = field(default_factory=EditConfig)
    methods: Mapping[str, MethodConfig] = field(
        default_factory=lambda: {name: kind() for name, kind in METHODS.items()}
    )
    sources: Mapping[str, Path] = field(default_factory=dict, compare=False)


def load_model_config(model: ConfiguredModel) -> ModelConfig:
    """Return a model's settings: the defaults, its family's file over them, and its own file over both.

    Raises ValueError, naming file and key, for a key that there is not or a value that it cannot have.
    """
    family = FAMILIES.get(model.family, DEFAULT_CONFIG)
    return read_model_config(family, *([model.settings_path] if model.settings_path else []))


def bundled_config(name: str) -> ModelConfig:
    """Return the settings of the bundled model called `name`, and for any other name those of Stable Diffusion.

    This is for where a name is all there is, as in a ledger; a model itself has `load_model_config`.
    """
    family = "FluxPipeline" if name == "mini-flux" else "StableDiffusionPipeline"
    return load_model_config(SettingsSource(family, bundled_settings(name)))


def bundled_settings(name: str) -> Path | None:
    """Return the settings file of the bundled model called `name`; None where no bundled model is called so."""
    todays = _RENAMED_MODELS.get(name, name)
    return REPO_ROOT / "models" / todays / SETTINGS_FILE if todays in BUNDLED_MODELS else None


def named_settings(name: str, advice: str) -> Path | None:
    """Return the file `configs/NAME.yaml` that an older version read for a model by its name; None where it has none.

    A notice says so, with `advice` on where the file belongs today, unless that is empty. A bundled model's file is
    read for no other model.
    """
    path = None if _RENAMED_MODELS.get(name, name) in BUNDLED_MODELS else _named_config(name)
    if path is not None and advice:
        rest = f"what it does not say comes from {_shown(DEFAULT_CONFIG)}"
        notify(f"{_shown(path)} is read since a model is called {name}, as older versions did; {rest}: {advice}")
    return path


def _named_config(name: str) -> Path | None:
    folder = REPO_ROOT / "configs"
    path = folder / f"{_RENAMED_MODELS.get(name, name)}.yaml"
    is_models = _is_file(path) and path.resolve().is_relative_to(folder.resolve())
    return path if is_models and name not in _OTHER_CONFIGS else None


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # no file can be called so
        return False


def read_model_config(*paths: Path) -> ModelConfig:
    """Return the settings in files: each over those before it, and all over the defaults.

    Raises ValueError as `load_model_config`.
    """
    config = ModelConfig()
    for path in paths:
        for place, content in _layers(path):
            config = _with_layer(config, place, content)
    return config


def _with_layer(config: ModelConfig, path: Path, content: Mapping[str, Any]) -> ModelConfig:
    """Return settings with what a file says in their place."""
    for key in content:
        if key not in _ALL_KEYS:
            raise ValueError(f"{path}: no key {key}{did_you_mean(str(key), list(_ALL_KEYS))}")
    methods = content.get("methods", {})
    if not isinstance(methods, dict):
        raise ValueError(f"{path}, methods: {methods!r} is no mapping from methods to their settings")
    for name in methods:
        if name not in METHODS:
            raise ValueError(f"{path}, methods: no method {name}{did_you_mean(str(name), list(METHODS))}")
    sections = {name: _merged(getattr(config, name), content.get(name, {}), path, name) for name in _SECTIONS}
    merged_methods = {
        name: _merged(settings, methods.get(name, {}), path, f"methods, {name}")
        for name, settings in config.methods.items()
    }
    sources = dict(config.sources)
    for name in _SECTIONS:
        sources |= {f"{name}.{key}": path for key in content.get(name, {})}
    for name, changes in methods.items():
        sources |= {f"methods.{name}.{key}": path for key in changes}
    return replace(config, **sections, methods=merged_methods, sources=sources)


def _merged(settings: AnySettings, changes: Any, path: Path, section: str) -> AnySettings:
    if not isinstance(changes, dict):
        raise ValueError(f"{path}, {section}: {changes!r} is no mapping from settings to their values")
    try:
        merged: Any = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(settings), changes))
    except (OmegaConfBaseException, TypeError, ValueError) as error:
        raise ValueError(f"{path}, {section}: {str(error).splitlines()[0]}") from error
    return merged


def with_asked(config: MethodConfig, changes: Mapping[str, Any]) -> MethodConfig:
    """Return a method's settings with what a user asked for in their place.

    That decides whether SRS-ME trains: the `mode`, or else a setting that acts only in training, or `init` zero, asks
    for training, from what `init` says; `max_steps` 0 stops at the closed form.
    """
    if not isinstance(config, SRSMEConfig):
        return config.with_changes(**changes)
    if changes.get("max_steps") == 0:
        if changes.get("mode") == "learn":
            raise ValueError("`max_steps` 0 trains nothing: give `mode` closed_form, or `max_steps` from 1")
        others = {name: value for name, value in changes.items() if name != "max_steps"}
        return config.with_changes(**{**others, "mode": "closed_form"})
    asks = LEARNING_SETTINGS & set(changes) or changes.get("init") == "zero"
    if "mode" in changes or not asks:
        return config.with_changes(**changes)
    return config.with_changes(**{"mode": "learn", **changes})


def describe_sources(config: ModelConfig, sections: Sequence[str], typed: Mapping[str, str]) -> str:
    """Return in a line where each setting of some sections comes from, such as `null_space` and `methods.SRS-ME`.

    `typed` has the flags of those that were typed, by the setting's name.
    """
    flags: list[str] = []
    by_file: dict[str, list[str]] = {}
    for section in sections:
        part, _, method = section.partition(".")
        settings = getattr(config, part)[method] if method else getattr(config, part)
        for entry in fields(settings):
            path = config.sources.get(f"{section}.{entry.name}")
            if entry.name in typed:
                flags.append(typed[entry.name])
            elif path is not None:
                by_file.setdefault(_shown(path), []).append(entry.name)
    parts = [f"{', '.join(flags)} typed"] if flags else []
    parts += [f"{path}: {', '.join(names)}" for path, names in by_file.items()]
    return f"settings: {'; '.join([*parts, 'all others: their defaults'])}"


def _shown(path: Path) -> str:
    """Return a path as it is shown: one inside this repository relative to it."""
    return str(path.relative_to(REPO_ROOT) if path.is_relative_to(REPO_ROOT) else path)


def component_dir(path: Path, config: Mapping[str, Any]) -> Path:
    """Return the folder that the config at `path` names for the configs of a checkpoint's parts.

    That is relative to the config, or by default Stable Diffusion v1's.
    """
    named = str(config.get("component_configs", "v1"))  # CompVis' own file has no such key
    return (DEFAULT_CONFIG.parent if named == "v1" else path.parent) / named


def save_settings(model: ConfiguredModel, folder: Path) -> None:
    """Write the settings file of a model that is saved in `folder`, so that it has the settings of `model` there."""
    path = model.settings_path
    if path is None:  # written all the same, and so no other model's settings are looked for
        text = "# What differs from the settings of this model's family: nothing.\n{}\n"
    elif path.name == SETTINGS_FILE:
        text = path.read_text(encoding="utf-8")
    else:
        text = OmegaConf.to_yaml(OmegaConf.masked_copy(read_settings(path), list(_CARRIED_KEYS)))
    write_text(folder / SETTINGS_FILE, text)


def read_settings(path: Path) -> DictConfig:
    """Return what a settings file says, over what the files say that it is merged over; raises as `read_yaml`."""
    return _merge([content for _, content in _layers(path)])


def _layers(path: Path, seen: tuple[Path, ...] = ()) -> list[_Layer]:
    """Return the files with the settings of the one at `path`, from weak to strong, itself the last.

    Below it are those that the folder of its `component_configs` carries, else those of its `base_config`. `seen` are
    the files that led here.
    """
    if path.resolve() in seen:
        raise ValueError(f"{path}: its settings lead back to itself")
    layers: list[_Layer] = []
    for place, content in reversed(_chain(path)):
        if not _is_compvis(content):
            layers.insert(0, (place, content))
        carried = component_dir(place, content) / SETTINGS_FILE
        if "component_configs" in content and place.name != SETTINGS_FILE and _is_file(carried):
            return [*_layers(carried, (*seen, path.resolve())), *layers]
    return layers


def _is_compvis(content: Mapping[str, Any]) -> bool:
    """Return whether this is CompVis' own config, which says how its code is built and has no settings in it."""
    return isinstance(content.get("model"), dict) and "target" in content["model"]


def read_yaml(path: Path) -> DictConfig:
    """Return the config at `path`, with today's keys, over that of the model that its `base_config` names.

    Raises ValueError when one cannot be read, is no mapping, or leads back to itself.
    """
    return _merge([content for _, content in _chain(path)])


def _merge(contents: Sequence[Mapping[str, Any]]) -> DictConfig:
    return DictConfig(OmegaConf.merge(*(OmegaConf.create(dict(content)) for content in contents)))


def _chain(path: Path) -> list[_Layer]:
    """Return a config and those that it is merged over by `base_config`, from weak to strong."""
    chain: list[_Layer] = []
    seen: list[Path] = []
    while True:
        content = upgrade(read_mapping(path))
        chain.insert(0, (path, content))
        seen.append(path.resolve())
        if "base_config" not in content:
            return chain
        base = _base_config(path, str(content["base_config"]))
        if base.resolve() in seen:
            raise ValueError(f"{path}: its base_config {content['base_config']} leads back to itself")
        path = base


def _base_config(path: Path, name: str) -> Path:
    """Return the file that the `base_config` of the one at `path` names."""
    base = _named_config(name)
    if base is None:
        names = [found.stem for found in (REPO_ROOT / "configs").glob("*.yaml") if found.stem not in _OTHER_CONFIGS]
        near = did_you_mean(name, names)
        raise ValueError(f"{path}: base_config {name} is no model's file in the folder configs{near}")
    return base
