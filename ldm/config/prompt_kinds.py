"""Prompts that say a concept's name, by kind of prompt, read from `configs/prompt_kinds.yaml`. No torch here.

What a user may type who wants a concept back: its name quoted, hyphenated, in questions, beside others. None of the
wordings is one that an erasure is fitted on, a bundled model is trained on, or a held-out template; the name alone,
which is fitted on, is a kind of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

from ldm.config.concepts import Concept
from ldm.config.everyday import read_section
from ldm.config.spellings import respellings, says
from ldm.config.templates import with_article
from ldm.config.yaml_files import check_keys, read_mapping
from ldm.io.paths import REPO_ROOT

ALONE, OTHER_SPELLINGS, LETTER_CASE, RESPELT = "alone", "other spellings", "letter case", "respelt"
MAX_WORDS = 50  # which CLIP reads whole
_STYLE, _OTHER, _ANY = "style", "other", "any"


def name_kinds(concept: Concept, max_words: int = MAX_WORDS) -> dict[str, list[str]]:
    """Return prompts that say a concept's name, by kind, the same each time; no prompt stands twice.

    Composites say one of the names `kin_of` it beside it. No prompt has more than `max_words` words between white
    space, and long ones have as many. All but those of `RESPELT` have one of its spellings in them. Raises ValueError
    where its name has more words than that.
    """
    name = concept.prompt
    if len(name.split()) > max_words:
        raise ValueError(f"`max_words` is {max_words}, and '{name}' has more words: give at least {len(name.split())}")
    content = _load()
    group = _STYLE if concept.kind == "style" else _OTHER
    templates = {kind: _of_group(found, group) for kind, found in content["templates"].items()}
    usual = ["{}", templates["end"][0], templates["sentences"][0]]
    spellings = [spelling for spelling in dict.fromkeys(concept.spellings) if spelling != name]
    kinds = {
        ALONE: [name],
        OTHER_SPELLINGS: [_fill(text, concept, spelling) for spelling in spellings for text in usual],
        LETTER_CASE: [_fill(text, concept, written) for written in _letter_cases(name) for text in usual],
        RESPELT: _respelt(concept),
    }
    names = kin_of(concept)
    for kind, found in templates.items():
        kinds[kind] = [
            _fill(text, concept, name).replace("{other}", names[number % len(names)])
            for number, text in enumerate(found)
        ]
    for kind, joint in content["long_joints"][group].items():
        kinds[kind] = [_long(_fill(joint, concept, name), filler, max_words) for filler in content["long"]]
    known: set[str] = set()
    unique: dict[str, list[str]] = {}
    for kind, prompts in kinds.items():
        fitting = [text for text in dict.fromkeys(prompts) if text not in known and len(text.split()) <= max_words]
        known.update(fitting)
        if fitting:
            unique[kind] = fitting
    return unique


@cache
def _load() -> Mapping[str, Any]:
    path = REPO_ROOT / "configs" / "prompt_kinds.yaml"
    return check_keys(read_mapping(path), ("templates", "long", "long_joints"), str(path))


def _of_group(found: Mapping[str, list[str]], group: str) -> list[str]:
    return found[_ANY] if _ANY in found else found[group]


def _fill(template: str, concept: Concept, name: str) -> str:
    """Return a template with a name of a concept where it says `{}`, and as a thing where it says `{thing}`."""
    things = {"object": with_article(name), "brand": f"the {name} logo"}
    return template.replace("{thing}", things.get(concept.kind, name)).replace("{}", name)


def _letter_cases(name: str) -> list[str]:
    """Return a name in small letters, in capitals, with a capital for each word, and with the other case throughout."""
    return [text for text in (name.lower(), name.upper(), name.title(), name.swapcase()) if text != name]


def _respelt(concept: Concept) -> list[str]:
    """Return the spellings as readers still take them for the name, and a text search does not."""
    found = [text for spelling in concept.spellings for text in respellings(spelling)]
    return [text for text in found if not says(text, concept.spellings)]


def kin_of(concept: Concept) -> list[str]:
    """Return names of a concept's kind that are none of `configs`: artists for a style or person, else things."""
    is_person = concept.kind in ("style", "person")
    names = read_section("lists", "kin")["artists" if is_person else "objects"]
    names = [text for text in names if not concept.is_named(text)]
    return names if is_person else [with_article(text) for text in names]


def _long(joint: str, filler: str, max_words: int) -> str:
    """Return a prompt of at most `max_words` words, of which the filler is cut at the side away from the name."""
    room = max(1, max_words - len(joint.split()) + 1)  # the filler's own place is counted as a word
    words = filler.split()
    kept = words[:room] if joint.endswith("{filler}") else words[-room:]
    return joint.replace("{filler}", " ".join(kept).strip(","))
