"""The commands that make a ledger again, from nothing."""

from __future__ import annotations

import json
import math
import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from ldm.cli.arguments import MODEL_ARGUMENTS
from ldm.config.concept_lists import make_concept, names_file
from ldm.config.concepts import Concept
from ldm.config.methods import METHODS, MethodConfig, SRSMEConfig, complete_gate_settings, complete_settings
from ldm.config.models import ModelConfig, bundled_config
from ldm.config.templates import with_article
from ldm.erasure.effect import LEAST_EFFECT, judged_form, least_effect_met
from ldm.ledger.ledger import Ledger
from ldm.ledger.lines import LedgerEntry

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
    names = {concept.label: concept.name for concept in ledger.concepts}
    added = {concept.label for entry in ledger.entries for concept in entry.add}
    commands = _naming_commands(ledger, "init", [concept for concept in ledger.concepts if concept.label not in added])
    known: set[str] = set()  # the digests of shifts that are there by now, and only activated again
    for entry in ledger.entries:
        if entry.add:
            commands += _naming_commands(ledger, "add", entry.add, entry.index)
        if entry.restore:
            commands.append(_command(ledger, "restore", *(names[label] for label in entry.restore)))
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


def _naming_commands(ledger: Ledger, name: str, concepts: Sequence[Concept], index: int = 0) -> list[str]:
    """Return the commands that begin a ledger with concepts, or add them by its entry `index`.

    Those that are more than their texts say are written into a file first.
    """
    header, commands = ledger.header, []
    texts = [_text_of(concept) for concept in concepts]
    arguments: list[str] = []
    if name == "init":
        arguments = _model_arguments(header)
        for flag, prompts in (("--protect", ledger.asked_for), ("--retain", ledger.retain)):
            arguments += [flag, *prompts] if prompts else []
    if not concepts[0].is_own:
        indexes = ",".join(str(concept.index) for concept in concepts)
        category = ["--category", ledger.category] if name == "init" else []
        arguments += [*category, "--erased_index", indexes]
    elif None not in texts:
        arguments += ["--concepts", *filter(None, texts)]
    else:
        file = f"concepts-{index}.yaml"
        written = shlex.join(["printf", "%s\\n", *_file_lines(concepts)])
        commands.append(f"{written} > {file}")
        arguments += ["--concepts", file]
    return [*commands, _command(ledger, name, *arguments)]


def _text_of(concept: Concept) -> str | None:
    """Return the text that names a concept, given as an argument; None where no text says all that it is."""
    for text in (concept.name, with_article(concept.name)):
        if make_concept(text) == concept and not names_file(text) and not text.startswith("-"):
            return text
    return None


def _file_lines(concepts: Sequence[Concept]) -> list[str]:
    """Return the lines of a YAML file of concepts, each of them in JSON, which is YAML too."""
    lines = ["concepts:"]
    for concept in concepts:
        entry = {"concept": concept.name, "kind": concept.kind, "aliases": concept.aliases, "anchor": concept.anchor}
        entry |= {"templates": concept.templates, "held_out_templates": concept.held_out_templates}
        lines.append(f"- {json.dumps({name: value for name, value in entry.items() if value}, ensure_ascii=False)}")
    return lines


def _erased_alike(ledger: Ledger, entry: LedgerEntry, known: set[str]) -> dict[tuple[str, ...], list[str]]:
    """Return the names of the concepts that an entry erases, by the flags that erase them.

    Those of the same flags belong into one command, as a joint method needs it. What is in `known` needs no flags, and
    what the entry erases is known afterwards.
    """
    erased: dict[tuple[str, ...], list[str]] = {}
    weak = [record for record in entry.erase.values() if not record.get("is_erased", True)]
    met = math.inf
    for record in weak:
        metadata = ledger.load(record).metadata
        met = min(met, least_effect_met(metadata, judged_form(metadata, record.get("effect"))))
    least = ["--least_effect", f"{math.floor(met * 100) / 100:g}"] if met < LEAST_EFFECT else []
    for record in entry.erase.values():
        flags = [] if record["digest"] in known else _method_flags(ledger, record)
        flags += least
        erased.setdefault(tuple(flags), []).append(record["concept"])
        known.add(record["digest"])
    return erased


def _settings(ledger: Ledger, record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that a shift was made with; what a model's file says today may be something else."""
    return complete_settings(record["method"], ledger.load(record).metadata.get("config", {}))


def _method_flags(ledger: Ledger, record: Mapping[str, Any]) -> list[str]:
    """Return the flags that give a shift's method and settings, and those of its null space and its gate."""
    method, metadata = record["method"], ledger.load(record).metadata
    settings = _settings(ledger, record) | dict(record.get("null_space", {}))
    if issubclass(METHODS[method], SRSMEConfig):
        gate = metadata.get("gate_config")
        settings |= complete_gate_settings(gate) if gate else {"gate": False}
    flags = ["--method", method]
    for name, value in settings.items():
        if isinstance(value, bool):
            flags.append(f"--{name}" if value else f"--no-{name}")
        elif value is not None:
            flags += [f"--{name}", str(value)]
    return flags
