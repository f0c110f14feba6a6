"""From parsed arguments to models, settings, artifacts and ledgers."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from ldm.cli import output
from ldm.cli.arguments import (
    DEFAULT_MODEL,
    MODEL_ARGUMENTS,
    Namespace,
    nonnegative_int,
    setting_type,
    spelled,
    typed,
    typed_settings,
)
from ldm.cli.devices import parse_devices
from ldm.config.methods import MethodConfig, NullSpaceConfig, SRSMEConfig
from ldm.config.models import ModelConfig, with_asked
from ldm.config.settings import Settings, did_you_mean
from ldm.diffusion import load
from ldm.diffusion.model import DiffusionModel
from ldm.io.errors import notify
from ldm.io.legacy import renamed_setting
from ldm.io.paths import ArtifactPaths
from ldm.io.prompts import PromptCase, make_cases, read_prompt_csv
from ldm.io.tensors import check_base_model
from ldm.ledger.ledger import Ledger, history_path

# Settings of SRS-ME by which gates alone are made, or their effect is measured.
_OF_GATES_ALONE = ("mode", "template_set", "target_templates")
_NOT_TRAINED = "nothing is trained: --mode is closed_form"
AnySettings = TypeVar("AnySettings", bound=Settings)


def load_model(args: Namespace, device: torch.device, dtype: str | None = "float32") -> DiffusionModel:
    """Return the model that --ckpt_path (with --config_path) or --model names, its denoiser in `dtype`.

    None is the dtype in which it is read.
    """
    if "ckpt_path" in typed and "model" in typed:
        raise ValueError("`model` and `ckpt_path` both name a model: give one of them")
    if args.ckpt_path == "" or args.model == "":
        raise ValueError("`model` or `ckpt_path` is empty: give a path, or leave it out")
    if args.config_path and not args.ckpt_path:
        raise ValueError("`config_path` says what `ckpt_path` is made of: give that too, or leave both out")
    source, torch_dtype = args.ckpt_path or args.model, getattr(torch, dtype) if dtype else None
    return report_guidance(load.load_model(source, device, args.config_path, torch_dtype, args.variant))


def report_guidance(model: DiffusionModel) -> DiffusionModel:
    """Return the model; say of one that takes no guidance scale that the one which was typed does nothing."""
    if "guidance_scale" in typed and not model.adapter.takes_guidance(model.pipeline):
        notify(f"`guidance_scale` does nothing in {model.name}, whose denoiser takes none")
    return model


def first_device(args: Namespace) -> torch.device:
    """Return the device that --device names."""
    return parse_devices(args.device)[0]


def fill_settings(args: Namespace, settings: AnySettings) -> AnySettings:
    """Return the settings with what was typed in place of their own."""
    return settings.with_changes(**typed_settings(args, type(settings)))


def artifact_paths(args: Namespace, model_name: str, method: str, category: str | None = None) -> ArtifactPaths:
    """Return where the bases and shifts of a method for a model are kept: of `category`, or else that of --category."""
    category = category or str(args.category)
    return ArtifactPaths(args.artifacts_dir, method, model_name, category, args.scene, args.scene_time)


def method_config(args: Namespace, config: ModelConfig, method: str) -> MethodConfig:
    """Return a method's settings in a model's config with what was typed in their place, as `with_asked` says."""
    return with_asked(config.methods[method], typed_settings(args, type(config.methods[method])))


def report_unused(args: Namespace, config: MethodConfig) -> None:
    """Say which of the settings that were typed do nothing where nothing is trained, or where gates alone are made.

    Raises ValueError for --no-gate where gates alone are made.
    """
    if config.trains:
        return
    if config.makes_gates_alone and "gate" in typed and not args.gate:
        raise ValueError(f"`mode` gate makes gates alone, and {spelled['gate']} none: leave one of both out")
    given = set(typed_settings(args, type(config))) - {"max_steps"}
    entries = [entry for entry in dataclasses.fields(config) if entry.name in given]
    if config.makes_gates_alone:
        names = [entry.name for entry in entries if entry.name not in _OF_GATES_ALONE]
        names += typed_settings(args, NullSpaceConfig)
    else:
        names = [entry.name for entry in entries if entry.metadata["training_only"]]
    names += [name for name in ("training_image_dir", "gradient_checkpointing", "frozen_device") if name in spelled]
    unused = [spelled.get(name, f"--{name}") for name in names]
    if unused:
        mode = "a gate alone is made: --mode is gate" if config.makes_gates_alone else _NOT_TRAINED
        notify(f"{', '.join(unused)}: not used, since {mode}")


def changed_methods(config: ModelConfig, changes: Sequence[str]) -> dict[str, MethodConfig]:
    """Return the settings of every method, changed by such as `FMN.lr=1e-2`.

    Raises ValueError when a change names no setting.
    """
    methods = dict(config.methods)
    for change in changes:
        place, _, text = change.partition("=")
        method, _, name = place.partition(".")
        if method not in methods or not name or not text:
            near = did_you_mean(method, list(methods))
            raise ValueError(
                f"`set` {change}: give METHOD.SETTING=VALUE as in the model's config, such as FMN.lr=1e-2{near}"
            )
        methods[method] = _changed(methods[method], renamed_setting(name), text, change)
    return methods


def _changed(config: MethodConfig, name: str, text: str, change: str) -> MethodConfig:
    entries = {entry.name: entry for entry in dataclasses.fields(config)}
    if name not in entries:
        raise ValueError(
            f"`set` {change}: no setting {name}{did_you_mean(name, list(entries))}, give such as FMN.lr=1e-2"
        )
    decides_mode = name == "max_steps" and isinstance(config, SRSMEConfig)
    try:
        changes = {name: nonnegative_int(text) if decides_mode else setting_type(entries[name])(text)}
    except argparse.ArgumentTypeError as error:
        raise ValueError(f"`set` {change}: {error}") from None
    return with_asked(config, changes) if decides_mode else config.with_changes(**changes)


def ledger_at(args: Namespace, path: Path) -> Ledger:
    """Return the ledger in a folder, or file; where no model is given, `args` get the ledger's."""
    ledger = Ledger(history_path(path))
    if not args.model and not args.ckpt_path:
        args.model = ledger.header.get("model") or str(DEFAULT_MODEL)
        for name in MODEL_ARGUMENTS[1:]:
            setattr(args, name, ledger.header.get(name))
    return ledger


def open_ledger(args: Namespace, path: Path) -> tuple[Ledger, DiffusionModel]:
    """Return the ledger in a folder, or file, and its model, or the one of the same digest that --model names."""
    ledger = ledger_at(args, path)
    model = load_model(args, first_device(args))
    check_base_model(ledger.header, model, ledger.path)
    return ledger, model


def prompt_cases(args: Namespace) -> list[PromptCase]:
    """Return the cases of --prompts_path, or of --prompts, from --start_case on. Raises ValueError for neither."""
    if bool(args.prompts) == bool(args.prompts_path):
        raise ValueError("give the prompts: `prompts` 'a red fox' 'a dog', or `prompts_path` a CSV file")
    if args.prompts_path:
        cases = read_prompt_csv(args.prompts_path)
    else:
        cases = make_cases(list(dict.fromkeys(args.prompts)), args.seeds_per_prompt, 0)
    return [case for case in cases if case.case_number >= args.start_case]


def print_export(result: Any) -> None:
    """Print what `ldm.erasure.export.export` measured and wrote."""
    import pandas as pd

    output.show_table(result.leakage.reset_index(), "leakage")
    output.show_table(pd.DataFrame(result.truncated), "truncated")
    for target in result.targets:
        print(f"-> {target}")
