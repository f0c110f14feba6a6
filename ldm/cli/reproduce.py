"""The commands that make a ledger again, from nothing."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from ldm.config.concepts import watermark_prompts
from ldm.ledger.ledger import Ledger, LedgerEntry


def reproduction_commands(ledger: Ledger) -> list[str]:
    """Return the commands that make a ledger of the same history, in order.

    Raises ValueError for a shift that is not the one that was activated.
    """
    names = {concept.index: concept.name for concept in ledger.concepts}
    commands = [_init_command(ledger)]
    known: set[str] = set()  # the digests of shifts that are there by now, and only activated again
    for entry in ledger.entries:
        if entry.restore:
            commands.append(_command(ledger, "restore", *(names[index] for index in entry.restore)))
        for flags, erased in _erased_alike(ledger, entry, known).items():
            commands.append(_command(ledger, "erase", *erased, *flags))
    return commands


def _command(ledger: Ledger, name: str, *arguments: str) -> str:
    script = ["python", "train-scripts/ledger.py", name, "--ledger_dir", str(ledger.root)]
    return shlex.join([*script, *arguments])


def _init_command(ledger: Ledger) -> str:
    """Return the command that begins the ledger: its model, its concepts and what else is protected."""
    header = ledger.header
    arguments = []
    for name in ("model", "ckpt_path", "config_path"):
        if header.get(name):
            arguments += [f"--{name}", header[name]]
    arguments += ["--category", header["category"], "--erased_index", ",".join(map(str, header["concepts"]))]
    extra_prompts = [prompt for prompt in header["protected"] if prompt not in ("", *watermark_prompts())]
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


def _method_flags(ledger: Ledger, record: Mapping[str, Any]) -> list[str]:
    """Return the flags that give a shift's method and settings."""
    flags = ["--method", record["method"]]
    for name, value in ledger.load(record).metadata.get("config", {}).items():
        if value is not None:
            flags += [f"--{name}", str(value)]
    return flags
