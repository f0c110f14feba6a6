"""The lines of a ledger's history: what each may say, and what it means in memory, whatever version wrote it.

Since version 2 the first line holds each concept whole, and everything is by a concept's label. Version 1 held indexes
of a category's list, whose concepts are those that the list has today.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

from ldm.config.concepts import CATEGORIES, OWN, Concept, check_spelled_once, get_concept
from ldm.config.methods import METHODS
from ldm.io.checks import is_count, is_mapping, is_number, is_text, is_texts
from ldm.io.legacy import upgrade

VERSION = 2
_SOURCE = ("model", "ckpt_path", "config_path", "variant")  # where the base model is to be found
MADE_UP = (ValueError, KeyError, TypeError, AttributeError, RecursionError)  # what reading such a line may raise


@dataclass(frozen=True)
class LedgerEntry:
    """One line after the header: at `time` (UTC, ISO 8601) concepts were erased, restored or added.

    `erase` maps the label of each erased concept to its shift's record (path below the root, digest and what is known
    of it). `leakage` has, by label, the largest leakage of the shifts made before on the prompts of what was added.
    """

    index: int
    time: str
    erase: Mapping[str, Mapping[str, Any]]
    restore: tuple[str, ...]
    add: tuple[Concept, ...] = ()
    leakage: Mapping[str, float] = field(default_factory=dict)


def read_line(line: str, version: int | None) -> dict[str, Any]:
    """Return what a line says, by today's keys. `version` is that of its ledger; None for the header, which says it.

    Raises one of `MADE_UP`, as all functions here do for what no ledger writes.
    """
    content = json.loads(line)
    if (content.get("version", 1) if version is None else version) == 1:
        return upgrade(content)
    return content


def write_line(content: Mapping[str, Any]) -> str:
    """Return a line of the history."""
    return json.dumps(content, ensure_ascii=False) + "\n"


def parse_header(content: Mapping[str, Any]) -> list[Concept]:
    """Return the concepts of a first line, in its order, having looked at all that it says."""
    texts = [content["base_model"], content["base_digest"], content["time"]]
    texts += [content[name] for name in _SOURCE if content.get(name) is not None]
    if not all(map(is_text, texts)) or not is_texts(content["protected"]):
        raise ValueError
    if not is_texts(content.get("retain", [])):
        raise ValueError
    listed, category, version = content["concepts"], content["category"], content.get("version", 1)
    if type(version) is not int or version not in (1, VERSION) or not isinstance(listed, list) or not listed:
        raise ValueError
    migrated = content.get("migrated_from", {"file": "", "sha256": ""})
    if not is_text(migrated["file"]) or not is_text(migrated["sha256"]) or not set(migrated["file"]).isdisjoint("/\\"):
        raise ValueError
    if version == 1:
        return [get_concept(category, index) for index in listed]
    if category not in (*CATEGORIES, OWN):
        raise ValueError
    return _parse_concepts(listed, {})


def _parse_concepts(listed: Sequence[Any], known: Mapping[str, Concept]) -> list[Concept]:
    """Return concepts that `to_dict` wrote, none of which is `known`, by label, or stands twice."""
    concepts = [Concept.from_dict(content) for content in listed]
    together = [*known.values(), *concepts]
    if not is_text(json.dumps(listed, ensure_ascii=False)) or any(concept.is_watermark for concept in concepts):
        raise ValueError
    if len({concept.label for concept in together}) < len(together):
        raise ValueError
    check_spelled_once(together, [""] * len(together))
    return concepts


def parse_entry(content: Mapping[str, Any], known: Mapping[str, Concept], version: int) -> LedgerEntry:
    """Return what a line after the header says of the concepts that are `known` by then, by label."""
    restored = content["restore"]
    if not isinstance(restored, list) or not is_text(content["time"]):
        raise ValueError
    if version == 1 and not all(type(index) is int for index in restored):
        raise ValueError
    restore = tuple(map(str, restored)) if version == 1 else tuple(restored)
    erase, leakage = dict(content["erase"]), dict(content.get("leakage", {}))
    if len(set(restore)) < len(restore) or not {*erase, *restore, *leakage} <= set(known):
        raise ValueError
    for record in erase.values():
        _check_record(record)
    if not all(map(is_number, leakage.values())):
        raise ValueError
    added = _parse_concepts(content["add"], known) if "add" in content else []
    return LedgerEntry(content["index"], content["time"], erase, restore, tuple(added), leakage)


def format_entry(entry: LedgerEntry, prev_hash: str, version: int) -> str:
    """Return the line of an entry, after the one with that digest."""
    restored: list[Any] = [int(label) if version == 1 else label for label in entry.restore]
    content: dict[str, Any] = {"index": entry.index, "time": entry.time, "prev_hash": prev_hash}
    content |= {"erase": dict(entry.erase), "restore": restored}
    if entry.add:
        content |= {"add": [concept.to_dict() for concept in entry.add], "leakage": dict(entry.leakage)}
    return write_line(content)


def _check_record(record: Mapping[str, Any]) -> None:
    """Raise an error for a shift's record that no ledger writes."""
    texts = [record[name] for name in ("concept", "method", "digest", "shift")]
    counts = [record.get(name) for name in ("rank", "bytes", "iterations")]
    numbers = [record.get(name) for name in ("seconds", "peak_gib", "effect", "target_change", "max_leakage_others")]
    known = [is_text(text) for text in texts] + [record["method"] in METHODS]
    known += [count is None or is_count(count) for count in counts]
    known += [number is None or is_number(number) for number in numbers]
    known += [type(record.get("is_erased", True)) is bool]
    known += [is_mapping(record.get("null_space", {}))]
    path = PurePosixPath(record["shift"])  # below the ledger's folder, whatever its folders are linked to
    if not all(known) or path.is_absolute() or ".." in path.parts or "\\" in record["shift"]:
        raise ValueError


def some_of(names: Iterable[str], most: int = 10) -> str:
    """Return names in a sentence: the first of many, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
