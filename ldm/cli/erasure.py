"""The erasure that the training scripts share: its devices, what it prints, and what is said where memory runs out."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from ldm.cli.arguments import Namespace, spelled, typed_settings
from ldm.cli.devices import init_distributed, parse_devices
from ldm.cli.session import artifact_paths, fill_settings, load_model, method_config
from ldm.config.concepts import parse_erase_targets
from ldm.config.methods import NO_GATE, ExecutionConfig, MethodConfig, SRSMEConfig
from ldm.config.models import describe_sources, load_model_config
from ldm.diffusion import load
from ldm.metrics.tables import to_markdown

if TYPE_CHECKING:
    import pandas as pd


def run_erasure(args: Namespace, method: str) -> None:
    """Erase the concepts of --erased_index by a method, and print what it took."""
    from ldm.erasure.erase import erase_concepts, summary_table

    concepts = parse_erase_targets(args.erased_index, args.category)
    device, frozen_device = _devices(args)
    device, shard = init_distributed(device)
    execution = ExecutionConfig(str(frozen_device) if frozen_device else None, args.gradient_checkpointing)
    model = load_model(args, device, getattr(args, "unet_dtype", "float32"))  # which SRS_ME.py alone asks for
    model_config = load_model_config(model)
    config = method_config(args, model_config, method)
    sections = [f"methods.{method}", *(["gate"] if isinstance(config, SRSMEConfig) else [])]
    print(describe_sources(model_config, sections, spelled))
    _report_unused(args, config)
    artifacts = artifact_paths(args, model.name, method)
    gate = fill_settings(args, model_config.gate) if isinstance(config, SRSMEConfig) else NO_GATE
    summaries = erase_concepts(model, artifacts, concepts, config, args.training_image_dir, execution, shard, gate)
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
    """Say which of the settings that were typed act only while something is trained, where nothing is."""
    if config.trains:
        return
    typed = set(typed_settings(args, type(config))) - {"max_steps"}
    entries = [entry for entry in dataclasses.fields(config) if entry.metadata["training_only"]]
    names = [entry.name for entry in entries if entry.name in typed]
    names += [name for name in ("training_image_dir", "gradient_checkpointing", "frozen_device") if name in spelled]
    unused = [spelled.get(name, f"--{name}") for name in names]
    if unused:
        print(f"{', '.join(unused)}: not used, since nothing is trained: --mode is closed_form")


def memory_table(args: Namespace, method: str) -> pd.DataFrame:
    """Return the table of `estimate_memory` for what the arguments say."""
    from ldm.erasure.memory import estimate_memory

    source = args.ckpt_path or args.model
    try:
        folder = load.resolve_config_dir(source, args.config_path, args.variant)
        model_config = load_model_config(load.settings_source(source, args.config_path, args.variant))
        config = method_config(args, model_config, method)
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
            "out of memory, and nothing was lost: choose a smaller row of the table, such as `unet_dtype` bfloat16 "
            "with `gradient_checkpointing`, or a smaller `train_batch_size`, or another `device`"
        ) from error
