"""The concepts that a user names: by text, or in a YAML, CSV or text file. No torch here."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ldm.config.concepts import (
    CATEGORIES,
    OWN_INDEX,
    Concept,
    check_name_list,
    check_spelled_once,
    check_templates,
    check_text,
    erasable_concepts,
    find_by_name,
    identity_of,
    is_one_of,
)
from ldm.config.methods import ANCHORS
from ldm.config.settings import did_you_mean
from ldm.config.spellings import says
from ldm.config.templates import KINDS
from ldm.config.yaml_files import check_keys, read_mapping
from ldm.io.errors import notify
from ldm.io.prompts import is_prompt_csv, read_prompt_csv, read_rows

MAX_CONCEPTS = 5000  # at once
MAX_CHARS = 200  # of a concept's name, which prompts have to say
_SUFFIXES = (".yaml", ".yml", ".csv", ".txt")
_COLUMNS = ("concept", "aliases", "anchor", "kind")
_YAML_KEYS = ("concept", "name", "prompts", "aliases", "anchor", "kind", "templates", "held_out_templates")
_OTHER_KINDS = {"artist": "style", "figure": "person", "public figure": "person", "proper name": "generic"}
KIND_NAMES = (*KINDS, *_OTHER_KINDS)
_MIN_NEAR = 5  # letters of names that may be one name, spelt in two ways


def read_concepts(values: Sequence[str], kind: str | None = None, anchor: str | None = None) -> list[Concept]:
    """Return the concepts that texts and files name, in their order.

    A value is a concept's text; an existing .yaml, .csv or .txt file of concepts; or NAME=FILE.txt, one concept that
    every line of the file says. What a file does not say of a concept is `kind` and `anchor`, or what `configs` knows
    of one of that name. Raises ValueError, with the place, for a file that is not so, for a text that is none, and for
    two concepts with the same name.
    """
    concepts: list[Concept] = []
    places: list[str] = []
    for value in values:
        name, _, path = value.partition("=")
        if _is_phrases_file(path):
            lines = [line for _, line in _read_lines(Path(path))]
            found = {f"'{value}'": make_concept(name, kind, lines, anchor, place=f"'{value}'")}
        elif Path(value).suffix.lower() in _SUFFIXES:
            found = _read_file(Path(value), kind, anchor)
        else:
            found = {f"'{value}'": make_concept(value, kind, (), anchor)}
        places += found
        concepts += found.values()
    if len(concepts) > MAX_CONCEPTS:
        raise ValueError(f"these are {len(concepts)} concepts: give at most {MAX_CONCEPTS} at once")
    check_spelled_once(concepts, places)
    _check_one_each(concepts)
    notify_of_near(concepts)
    return concepts


def names_file(text: str) -> bool:
    """Return whether a text is, to `read_concepts`, a file, or NAME=FILE.txt, and not a concept's own text."""
    return Path(text).suffix.lower() in _SUFFIXES or _is_phrases_file(text.partition("=")[2])


def _is_phrases_file(path: str) -> bool:
    return path.lower().endswith(".txt") and Path(path).is_file()


def read_prompts(values: Sequence[str], setting: str = "protect") -> list[str]:
    """Return the prompts that texts and files say: a .txt has one a line, a .csv or .yaml concepts as `read_concepts`.

    A .csv may be a prompt list too. Raises ValueError, with the place, for a file that is not so, and for a text with
    nothing in it, which the `setting` has.
    """
    prompts: dict[str, None] = {}
    for value in values:
        path = Path(value)
        if path.suffix.lower() == ".txt":
            prompts |= dict.fromkeys(line for _, line in _read_lines(path))
        elif path.suffix.lower() == ".csv" and is_prompt_csv(path):
            prompts |= dict.fromkeys(case.prompt for case in read_prompt_csv(path))
        elif path.suffix.lower() in _SUFFIXES:
            for concept in _read_file(path, None, None).values():
                prompts |= dict.fromkeys(concept.spellings)
        elif not value.strip():
            raise ValueError(
                f"`{setting}` has an empty text: give prompts, or leave it out (the empty one is protected)"
            )
        else:
            prompts[value] = None
    return list(prompts)


def split_restored(concepts: Sequence[Concept], names: Sequence[str]) -> tuple[list[Concept], list[Concept]]:
    """Return the concepts of a list that stay erased, and those that `names` restore, each by any of its spellings.

    Raises ValueError for a name that is none of theirs, and where none stays erased.
    """
    every_spelling = [spelling for concept in concepts for spelling in concept.spellings]
    for name in names:
        if not is_one_of(name, every_spelling):
            near = did_you_mean(name, every_spelling)
            raise ValueError(f"`restored` names '{name}', which is not in the list of concepts{near}")
    restored = [concept for concept in concepts if any(concept.is_named(name) for name in names)]
    erased = [concept for concept in concepts if concept not in restored]
    if not erased:
        raise ValueError("`restored` names every concept of the list: leave out one that stays erased")
    return erased, restored


def check_apart_from(prompts: Sequence[str], concepts: Sequence[Concept]) -> None:
    """Raise ValueError for a protected prompt that says one of the concepts to erase."""
    for prompt in prompts:
        for concept in concepts:
            if says(prompt, concept.spellings):
                raise ValueError(
                    f"the protected prompt '{prompt}' says {concept.name}, which cannot be erased and protected at "
                    "once: leave it out of `protect`"
                )


def make_concept(
    text: str, kind: str | None = None, aliases: Sequence[str] = (), anchor: str | None = None, place: str = ""
) -> Concept:
    """Return the concept that a text names, with what `configs` knows of one of that name.

    Of any other, `kind` says what kind of thing it is, by default an object where the text begins with "a" or "an",
    which is no part of the name, and else generic. Raises ValueError, naming `place`, for a text that names nothing,
    and for an anchor that says the concept.
    """
    place = place or f"the concept {text!r}"
    whole = " ".join(text.split())
    name = _without_article(check_text(whole, place))
    if not re.search(r"\w", name) or len(name) > MAX_CHARS:
        raise ValueError(f"{place} names nothing: give a text of at most {MAX_CHARS} characters with a letter in it")
    if kind is not None:
        _check_kind(kind, place)
        kind = _OTHER_KINDS.get(kind, kind)
    others = [_without_article(" ".join(check_text(alias, f"{place}, aliases").split())) for alias in aliases]
    if not all(others):
        raise ValueError(f"{place} has an empty alias: give a text, or leave it out")
    concept = _known(name) or Concept(OWN_INDEX, name, name)
    if concept.kind == "generic" and name != whole:
        concept = replace(concept, kind="object")
    spellings = dict.fromkeys([*concept.aliases, *others])
    concept = replace(
        concept,
        aliases=tuple(text for text in spellings if text.lower() != name.lower()),
        kind=kind or concept.kind,
    )
    return concept if anchor is None else with_anchor(concept, anchor, place)


def _without_article(text: str) -> str:
    """Return a text without the article before it, but for that of a title: 'red fox', and 'A Bigger Splash'."""
    return re.sub(r"^(a|an) (?=\S)", "", text)


def _known(name: str) -> Concept | None:
    """Return a concept of `configs` as one that its user names `name`; None where none is called so."""
    for category in CATEGORIES:
        known = find_by_name(category, name)
        if known is not None and not known.is_watermark:
            others = [text for text in dict.fromkeys(known.spellings) if text.lower() != name.lower()]
            # without its templates, which are those of the bundled model's captions
            return Concept(OWN_INDEX, name, name, tuple(others), anchor_prompt=known.anchor_prompt, kind=known.kind)
    return None


def with_anchor(concept: Concept, anchor: str, place: str) -> Concept:
    """Return a concept with what takes the place of its name.

    Raises ValueError for a text that says it, that is none, or that is one of `ANCHORS`.
    """
    check_text(anchor, f"{place}, anchor")
    if not anchor:
        raise ValueError(f"{place} has an empty anchor: give `anchor` a text, such as 'a painting', or leave it out")
    if anchor in ANCHORS:
        raise ValueError(
            f"{place} has the anchor '{anchor}', which is a setting and no text: give `anchor` {anchor} for all "
            "concepts of an erasure, or another text"
        )
    if says(anchor, concept.spellings):
        raise ValueError(
            f"{place}: the anchor '{anchor}' says {concept.name}, which would stay: give `anchor` another text"
        )
    return replace(concept, anchor=anchor, anchor_prompt=anchor)


def _read_file(path: Path, kind: str | None, anchor: str | None) -> dict[str, Concept]:
    """Return the concepts of a file by the place where they stand."""
    if not path.is_file():
        raise ValueError(
            f"there is no list of concepts {path}: see how it is spelt, or give the concepts' texts themselves"
        )
    entries = {".csv": _csv_entries, ".txt": _text_entries}.get(path.suffix.lower(), _yaml_entries)(path)
    if not entries:
        raise ValueError(f"{path} has no concept: give each a line")
    if len(entries) > MAX_CONCEPTS:
        raise ValueError(f"{path} has {len(entries)} concepts: give at most {MAX_CONCEPTS} at once")
    concepts: dict[str, Concept] = {}
    for place, entry in entries.items():
        texts = entry["concept"], entry.get("kind") or kind, entry.get("aliases", ()), entry.get("anchor") or anchor
        concept = make_concept(*texts, place=place)
        templates = {name: entry[name] for name in ("templates", "held_out_templates") if entry.get(name)}
        concepts[place] = replace(concept, **templates)
    check_spelled_once(list(concepts.values()), list(concepts))
    return concepts


def _read_lines(path: Path) -> list[tuple[int, str]]:
    """Return the lines of a text file with their numbers, but for blank ones and those that begin with #."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except OSError:
        raise ValueError(f"there is no file {path}: see how it is spelt, or give its lines themselves") from None
    except UnicodeDecodeError:
        raise ValueError(f"{path} is no text in UTF-8: save it as such") from None
    found = [(number, line.strip()) for number, line in enumerate(lines, 1)]
    found = [(number, line) for number, line in found if line and not line.startswith("#")]
    if not found:
        raise ValueError(f"{path} has nothing in it: give a concept, or a prompt, a line")
    return found


def _text_entries(path: Path) -> dict[str, dict[str, Any]]:
    return {f"{path} line {number}": {"concept": line} for number, line in _read_lines(path)}


def _csv_entries(path: Path) -> dict[str, dict[str, Any]]:
    """Return the rows of a CSV file with the columns concept, aliases (apart by semicolons), anchor and kind."""
    expected = f"a list of concepts has the column concept, and may have {', '.join(_COLUMNS[1:])}, each once"
    lines, rows = read_rows(path)
    columns = ["concept" if name == "name" else name for name in rows[0]] if rows else []  # as it was called before
    if "concept" not in columns or set(columns) - set(_COLUMNS) or len(set(columns)) < len(columns):
        raise ValueError(f"{path} has the columns {','.join(rows[0]) if rows else '(none)'}: {expected}")
    entries: dict[str, dict[str, Any]] = {}
    for line, row in zip(lines[1:], rows[1:], strict=True):
        place = f"{path} line {line}"
        if len(row) != len(columns):
            raise ValueError(
                f"{place} has {len(row)} fields for {len(columns)} columns: put a text that has a comma into double "
                'quotes ("a, b"), and no comma at the end of a line'
            )
        entry: dict[str, Any] = {name: field.strip() for name, field in zip(columns, row, strict=True)}
        _check_kind(entry.get("kind", ""), f"{place}, column kind")
        aliases = entry.get("aliases", "")
        entry["aliases"] = [alias.strip() for alias in aliases.split(";")] if aliases else []
        entries[place] = entry
    return entries


def _yaml_entries(path: Path) -> dict[str, dict[str, Any]]:
    """Return the list `concepts` of a YAML file: texts, or mappings; `kind` and `anchor` beside it hold for all."""
    advice = "begin it with the line 'concepts:', and below it give each concept a line, as '- red fox'"
    content = check_keys(read_mapping(path, advice), ("kind", "anchor", "concepts"), str(path))
    listed = content.get("concepts")
    if not isinstance(listed, list) or not listed:
        raise ValueError(f"{path}, concepts is {listed!r}, not a list of one or more: {advice}")
    entries: dict[str, dict[str, Any]] = {}
    for number, value in enumerate(listed, 1):
        place = f"{path}, concept {number}"
        entry = {"concept": value} if not isinstance(value, dict) else dict(check_keys(value, _YAML_KEYS, place))
        entries[place] = _checked_entry({"kind": content.get("kind"), "anchor": content.get("anchor")} | entry, place)
    return entries


def _checked_entry(entry: Mapping[str, Any], place: str) -> dict[str, Any]:
    """Return an entry of a YAML file with values of the right kinds. Raises ValueError, with the key, for others."""
    phrases = list(check_name_list(entry.get("prompts", []), f"{place}, prompts"))
    name = check_text(entry.get("concept", entry.get("name", phrases[0] if phrases else None)), f"{place}, concept")
    anchor, kind = entry.get("anchor"), entry.get("kind")
    if anchor is not None:
        check_text(anchor, f"{place}, anchor")
    _check_kind("" if kind is None else check_text(kind, f"{place}, kind"), f"{place}, kind")
    return {
        "concept": name,
        "aliases": [*phrases, *check_name_list(entry.get("aliases", []), f"{place}, aliases")],
        "anchor": anchor,
        "kind": kind or "",
        "templates": check_templates(entry.get("templates", []), f"{place}, templates"),
        "held_out_templates": check_templates(entry.get("held_out_templates", []), f"{place}, held_out_templates"),
    }


def _check_kind(kind: str, place: str) -> None:
    if kind and kind not in KIND_NAMES:
        near = did_you_mean(kind, list(KIND_NAMES))
        raise ValueError(f"{place}: '{kind}' is none of {', '.join(KIND_NAMES)}: choose one of them{near}")


def _check_one_each(concepts: Sequence[Concept]) -> None:
    """Raise ValueError for a name that lists known concepts, and ask about one that may list others."""
    for concept in concepts:
        parts = [part.strip() for part in re.split("[,;]", concept.name)]
        quoted = " ".join(f"'{part}'" for part in parts)
        if len(parts) > 1 and all(part and _known(_without_article(part)) for part in parts):
            raise ValueError(f"'{concept.name}' would be one concept of this name: give {quoted}, apart by spaces")
        if len(parts) > 1 and all(parts) and not re.search(r", |\d,\d", concept.name):
            notify(f"'{concept.name}' is one concept of this name: for several give {quoted}, apart by spaces")


def notify_of_near(concepts: Sequence[Concept]) -> None:
    """Ask about concepts that may be one, or one of `configs`, spelt in two ways."""
    pairs = near_pairs([concept.name for concept in concepts])
    if pairs:
        shown = ", ".join(f"'{first}' and '{second}'" for first, second in pairs[:3])
        more = f" and {len(pairs) - 3} more pairs" if len(pairs) > 3 else ""
        notify(
            f"{shown}{more} are spelt nearly alike: if that is one concept, name it once, and give the other spelling "
            "as an alias, in a file with the columns concept and aliases"
        )
    names = [concept.name for concept in concepts]
    listed = [concept.name for category in CATEGORIES for concept in erasable_concepts(category)]
    for known, name in near_pairs([*listed, *names]):
        if known in listed and name in names and _known(name) is None:
            notify(f"'{name}' is spelt nearly as {known} is, and taken for a concept of your own: stop if it is not")


def near_pairs(names: Sequence[str]) -> list[tuple[str, str]]:
    """Return the pairs of names that differ in one or two letters: those that are the same when each lacks one.

    Names of few letters, and those that differ in their digits, are no pair.
    """
    owners: dict[str, str] = {}
    pairs: dict[tuple[str, str], None] = {}
    for name in names:
        identity = identity_of(name)
        if len(identity) < _MIN_NEAR:
            continue
        for variant in {identity, *(identity[:k] + identity[k + 1 :] for k in range(len(identity)))}:
            other = owners.setdefault(variant, name)
            if other != name and re.findall("[0-9]", other) == re.findall("[0-9]", name):
                pairs[other, name] = None
    return list(pairs)
