"""From parsed arguments to models, settings, artifacts and ledgers, and the erasure that the training scripts share."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from ldm.cli.arguments import DEFAULT_MODEL, Namespace, nonnegative_int, setting_type, spelled, typed_settings
from ldm.cli.devices import init_distributed, parse_devices
from ldm.config.concepts import parse_erase_targets
from ldm.config.methods import ExecutionConfig, MethodConfig, Settings, SRSMEConfig, did_you_mean
from ldm.config.models import ModelConfig, load_model_config
from ldm.diffusion import load
from ldm.diffusion.model import DiffusionModel
from ldm.io.legacy import RENAMED_KEYS
from ldm.io.paths import ArtifactPaths
from ldm.io.tensors import check_base_model
from ldm.ledger.ledger import HISTORY_FILE, Ledger
from ldm.metrics.tables import to_markdown

if TYPE_CHECKING:
    import pandas as pd

AnySettings = TypeVar("AnySettings", bound=Settings)


def load_model(args: Namespace, device: torch.device, dtype: str = "float32") -> DiffusionModel:
    """Return the model that --ckpt_path (with --config_path) or --model names, its U-Net in `dtype`."""
    return load.load_model(args.ckpt_path or args.model, device, args.config_path, getattr(torch, dtype))


def first_device(args: Namespace) -> torch.device:
    """Return the device that --device names."""
    return parse_devices(args.device)[0]


def fill_settings(args: Namespace, settings: AnySettings) -> AnySettings:
    """Return the settings with what was typed in place of their own."""
    return settings.with_changes(**typed_settings(args, type(settings)))


def artifact_paths(args: Namespace, model_name: str, method: str) -> ArtifactPaths:
    """Return where the bases and shifts of a method for a model are kept."""
    return ArtifactPaths(args.artifacts_dir, method, model_name, args.category, args.scene, args.scene_time)


def method_config(args: Namespace, config: ModelConfig, method: str) -> MethodConfig:
    """Return a method's settings in a model's config with what was typed in their place.

    Whether SRS-ME learns is decided by the flags: --mode, or else --max_steps, of which 0 stops at the closed form.
    """
    base = config.methods[method]
    changes = typed_settings(args, type(base))
    return base.with_changes(**(_with_mode(changes) if isinstance(base, SRSMEConfig) else changes))


def _with_mode(changes: dict[str, Any]) -> dict[str, Any]:
    """Return changes of SRS-ME's settings with the mode that a number of iterations asks for."""
    if "max_steps" not in changes:
        return changes
    if changes["max_steps"] > 0:
        return {"mode": "learn", **changes}
    if changes.get("mode") == "learn":
        raise ValueError("`max_steps` 0 learns nothing: give `mode` closed_form, or `max_steps` from 1")
    others = {name: value for name, value in changes.items() if name != "max_steps"}
    return {**others, "mode": "closed_form"}


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
        methods[method] = _changed(methods[method], RENAMED_KEYS.get(name, name), text, change)
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
    return config.with_changes(**(_with_mode(changes) if decides_mode else changes))


def run_erasure(args: Namespace, method: str) -> None:
    """Erase the concepts of --erased_index by a method, and print what it took."""
    from ldm.erasure.erase import erase_concepts, summary_table

    concepts = parse_erase_targets(args.erased_index, args.category)
    device, frozen_device = _devices(args)
    device, shard = init_distributed(device)
    execution = ExecutionConfig(str(frozen_device) if frozen_device else None, args.gradient_checkpointing)
    model = load_model(args, device, getattr(args, "unet_dtype", "float32"))  # which SRS_ME.py alone asks for
    config = method_config(args, load_model_config(model.config_name), method)
    _report_unused(args, config)
    artifacts = artifact_paths(args, model.name, method)
    summaries = erase_concepts(model, artifacts, concepts, config, args.training_image_dir, execution, shard)
    if summaries:
        print(to_markdown(summary_table(summaries)))


def _devices(args: Namespace) -> tuple[torch.device, torch.device | None]:
    """Return the device of the model, and that of the passes without gradient if it is another one."""
    if args.devices and (args.device or args.frozen_device):
        raise ValueError(f"`devices` {args.devices} says both devices: leave `device` and `frozen_device` out")
    devices = parse_devices(args.devices or args.device)
    frozen = devices[1] if len(devices) > 1 else None
    if args.frozen_device:
        frozen = parse_devices(args.frozen_device)[0]
    return devices[0], frozen


def _report_unused(args: Namespace, config: MethodConfig) -> None:
    """Say which of the settings that were typed act only while something is learnt, where nothing is."""
    if config.learns:
        return
    typed = set(typed_settings(args, type(config))) - {"max_steps"}
    entries = [entry for entry in dataclasses.fields(config) if entry.metadata["learning_only"]]
    unused = [spelled.get(entry.name, f"--{entry.name}") for entry in entries if entry.name in typed]
    if unused:
        print(f"{', '.join(unused)}: not used, since nothing is learnt: --mode is closed_form")


def memory_table(args: Namespace, method: str) -> pd.DataFrame:
    """Return the table of `estimate_memory` for what the arguments say."""
    from ldm.erasure.memory import estimate_memory

    source = args.ckpt_path or args.model
    try:
        folder = load.resolve_config_dir(source, args.config_path)
        config = method_config(args, load_model_config(load.resolve_names(source, args.config_path)[1]), method)
        assert isinstance(config, SRSMEConfig)
        return estimate_memory(folder, _devices(args)[0], config.train_batch_size, config.max_directions)
    except (OSError, KeyError) as error:
        raise ValueError(
            f"no configs of a model in '{source}': pass `model` a diffusers folder, or `ckpt_path` a checkpoint"
        ) from error


@contextmanager
def explain_oom(args: Namespace, method: str) -> Iterator[None]:
    """While the block runs, let running out of memory end in the table of `memory_table` and a ValueError."""
    try:
        yield
    except (torch.OutOfMemoryError, RuntimeError) as error:
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        print(f"predicted peak memory, GiB:\n{to_markdown(memory_table(args, method))}")
        raise ValueError(
            "out of memory, and nothing was lost: choose a smaller row of the table, such as `unet_dtype` "
            "bfloat16 with "
            "`gradient_checkpointing`, or a smaller `train_batch_size`, or another `device`"
        ) from error


def ledger_at(args: Namespace, path: Path) -> Ledger:
    """Return the ledger in a folder, or file; where no model is given, `args` get the ledger's."""
    ledger = Ledger(path if path.suffix == ".jsonl" else path / HISTORY_FILE)
    if not args.model and not args.ckpt_path:
        args.model = ledger.header.get("model") or str(DEFAULT_MODEL)
        args.ckpt_path, args.config_path = (ledger.header.get(name) for name in ("ckpt_path", "config_path"))
    return ledger


def open_ledger(args: Namespace, path: Path) -> tuple[Ledger, DiffusionModel]:
    """Return the ledger in a folder, or file, and its model, or the one of the same digest that --model names."""
    ledger = ledger_at(args, path)
    model = load_model(args, first_device(args))
    check_base_model(ledger.header, model.digest, ledger.path)
    return ledger, model


def print_export(result: Any) -> None:
    """Print what `ldm.erasure.export.export` measured and wrote."""
    import pandas as pd

    print(to_markdown(result.leakage.reset_index()))
    if result.truncated:
        print(f"\n{to_markdown(pd.DataFrame(result.truncated))}")
    for target in result.targets:
        print(f"-> {target}")
