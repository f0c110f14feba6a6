"""The commands that make a ledger again, from nothing."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from typing import Any

from ldm.cli.arguments import MODEL_ARGUMENTS
from ldm.config.concepts import always_protected_prompts
from ldm.config.methods import MethodConfig, complete_settings
from ldm.config.models import ModelConfig, bundled_config
from ldm.ledger.ledger import Ledger, LedgerEntry

SCENE_LEDGER_RE = re.compile(r"scene(?P<number>\d+)-[a-z]+-(?P<method>.+)\.jsonl")  # as `run_scene` calls them


def reproduction_commands(
    ledger: Ledger, source: Mapping[str, Any] | None = None, config: ModelConfig | None = None
) -> list[str]:
    """Return the commands that make a ledger of the same history, in order: of a scene's, the one that runs the scene.

    `source` has the arguments of the model, `MODEL_ARGUMENTS`, among others: a scene's ledger does not say them.
    `config` has the model's settings, which the commands need not repeat; by default those of the model's name.
    Raises ValueError for a shift that is not the one that was activated.
    """
    scene = SCENE_LEDGER_RE.fullmatch(ledger.path.name)
    if scene:
        settings = config or bundled_config(ledger.header["base_model"])
        return [_scene_command(ledger, source or {}, scene["number"], settings.methods[scene["method"]])]
    names = {concept.index: concept.name for concept in ledger.concepts}
    commands = [_init_command(ledger)]
    known: set[str] = set()  # the digests of shifts that are there by now, and only activated again
    for entry in ledger.entries:
        if entry.restore:
            commands.append(_command(ledger, "restore", *(names[index] for index in entry.restore)))
        for flags, erased in _erased_alike(ledger, entry, known).items():
            commands.append(_command(ledger, "erase", *erased, *flags))
    return commands


def _scene_command(ledger: Ledger, source: Mapping[str, Any], number: str, config: MethodConfig) -> str:
    """Return the command that runs a scene by one method, with the settings that its shifts were made with.

    `config` has those that the method has where the command is silent.
    """
    arguments = [*_model_arguments(source), "--category", ledger.header["category"], "--scene", number]
    arguments += ["--methods", config.name]
    if ledger.root.name == "all":  # where scenes.py keeps shifts that protect the whole category
        arguments += ["--protect_scope", "all"]
    record = next(iter(ledger.last_shifts().values()), None)
    if record:
        settings, used = config.to_dict(), _settings(ledger, record)
        arguments += ["--seed", str(used["seed"])] if used.get("seed") else []
        changed = [name for name in used if name != "seed" and used[name] not in (None, settings.get(name))]
        arguments += ["--set", *(f"{config.name}.{name}={used[name]}" for name in changed)] if changed else []
    return shlex.join(["python", "eval-scripts/scenes.py", *arguments])


def _model_arguments(source: Mapping[str, Any]) -> list[str]:
    """Return the flags that name a model."""
    arguments: list[str] = []
    for name in MODEL_ARGUMENTS:
        if source.get(name):
            arguments += [f"--{name}", str(source[name])]
    return arguments


def _command(ledger: Ledger, name: str, *arguments: str) -> str:
    script = ["python", "train-scripts/ledger.py", name, "--ledger_dir", str(ledger.root)]
    return shlex.join([*script, *arguments])


def _init_command(ledger: Ledger) -> str:
    """Return the command that begins the ledger: its model, its concepts and what else is protected."""
    header = ledger.header
    arguments = [*_model_arguments(header), "--category", header["category"]]
    arguments += ["--erased_index", ",".join(map(str, header["concepts"]))]
    extra_prompts = [prompt for prompt in header["protected"] if prompt not in always_protected_prompts()]
    if extra_prompts:
        arguments += ["--protect", *extra_prompts]
    return _command(ledger, "init", *arguments)


def _erased_alike(ledger: Ledger, entry: LedgerEntry, known: set[str]) -> dict[tuple[str, ...], list[str]]:
    """Return the names of the concepts that an entry erases, by the flags that erase them.

    Those of the same flags belong into one command, as a joint method needs it. What is in `known` needs no flags, and
    what the entry erases is known afterwards.
    """
    erased: dict[tuple[str, ...], list[str]] = {}
    for record in entry.erase.values():
        flags = [] if record["digest"] in known else _method_flags(ledger, record)
        erased.setdefault(tuple(flags), []).append(record["concept"])
        known.add(record["digest"])
    return erased


def _settings(ledger: Ledger, record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that a shift was made with; what a model's file says today may be something else."""
    return complete_settings(record["method"], ledger.load(record).metadata.get("config", {}))


def _method_flags(ledger: Ledger, record: Mapping[str, Any]) -> list[str]:
    """Return the flags that give a shift's method and settings."""
    flags = ["--method", record["method"]]
    for name, value in _settings(ledger, record).items():
        if value is not None:
            flags += [f"--{name}", str(value)]
    return flags
