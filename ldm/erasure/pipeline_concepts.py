"""From the texts that a user gives to `ConceptEraser(pipe).erase` to concepts that can be erased together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from ldm.config.concept_lists import make_concept, names_file
from ldm.config.concepts import Concept, always_protected_prompts
from ldm.config.methods import ANCHORS
from ldm.config.spellings import says

Value = TypeVar("Value")


@dataclass(frozen=True)
class Details:
    """What is said of the concepts that texts name: kinds, other spellings and anchors, for all texts alike or by text.

    A text that none is given for is of the kind that `make_concept` says, has no other spelling, and the neutral word
    of its kind.
    """

    kind: str | Mapping[str, str] | None = None
    aliases: Mapping[str, Sequence[str]] | None = None
    anchor: str | Mapping[str, str] | None = None


def as_list(texts: Sequence[str] | str, setting: str) -> list[str]:
    """Return texts, one or several, as a list. Raises ValueError where they are none, and for a file."""
    found = [texts] if isinstance(texts, str) else list(texts)
    for text in found:
        if type(text) is not str:
            raise ValueError(f"`{setting}` has {text!r}, which is no text: give texts, such as 'Vincent van Gogh'")
        if names_file(text):
            raise ValueError(f"`{setting}` has the file '{text}', and files are not taken here: give the texts in it")
    return found


def tidied(texts: Sequence[str] | str, setting: str) -> list[str]:
    """Return texts without superfluous white space. Raises ValueError where there is none, or an empty one."""
    found = [" ".join(text.split()) for text in as_list(texts, setting)]
    if not all(found) or not found:
        raise ValueError(f"`{setting}` has an empty text, or none at all: name a concept, such as 'Vincent van Gogh'")
    return found


def names_all(texts: Sequence[str], erased: str | None) -> bool:
    """Return whether texts name all that is erased: as `all`, where no concept of that text is `erased`."""
    return erased is None and [text.strip().lower() for text in texts] == ["all"]


def new_concepts(texts: Sequence[str] | str, details: Details, erased: Mapping[str, Concept]) -> dict[str, Concept]:
    """Return the concepts that texts name and that are not `erased` yet, by text.

    Raises ValueError for a kind that there is not, for aliases that are not apart from other concepts, and for what is
    said otherwise of a concept that is erased already.
    """
    texts = tidied(texts, "texts")
    kinds = _by_text(details.kind, texts, "kind")
    anchors = _by_text(details.anchor, texts, "anchor")
    aliases = {text: tidied(others, "aliases") for text, others in _by_text(details.aliases, texts, "aliases").items()}
    new: dict[str, Concept] = {}
    for text in texts:
        known = {**erased, **new}
        named = next((concept for concept in known.values() if concept.is_named(text)), None)
        concept = named or make_concept(text, kinds.get(text))
        others = [alias for alias in aliases.get(text, ()) if not concept.is_named(alias)]
        anchor = tidied(anchors[text], "anchor")[0] if text in anchors else concept.anchor
        if anchor in ANCHORS:
            raise ValueError(
                f"the `anchor` '{anchor}' of '{text}' is no text but a setting: give a text such as 'a painting', or "
                "leave it out for a neutral word"
            )
        if named is None:
            new[text] = replace(concept, aliases=(*concept.aliases, *others), anchor=anchor)
            _check_apart(new[text], known)
        elif others or anchor != named.anchor:
            setting = "aliases" if others else "anchor"
            raise ValueError(f"'{text}' is erased already: restore it before you erase it with other `{setting}`")
    return new


def check_said(concepts: Mapping[str, Concept], protected: Iterable[str]) -> None:
    """Raise ValueError where a protected prompt, or an anchor, says a concept that is erased."""
    for text, concept in concepts.items():
        for prompt in [*always_protected_prompts(), *protected]:
            if says(prompt, concept.spellings):
                raise ValueError(
                    f"the protected prompt {prompt!r} says '{text}': protect prompts that do not say what is erased"
                )
        for other, anchored in concepts.items():
            if anchored.anchor is not None and says(anchored.anchor, concept.spellings):
                raise ValueError(
                    f"the `anchor` '{anchored.anchor}' of '{other}' says '{text}', which is erased: choose an anchor "
                    "that says none of what is erased"
                )


def _by_text(value: Value | Mapping[str, Value] | None, texts: Sequence[str], setting: str) -> dict[str, Value]:
    """Return what is given for each text, by text. Raises ValueError for a text that is none of the texts."""
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        return dict.fromkeys(texts, value)
    found: dict[str, Value] = {}
    for text, own in value.items():
        name = tidied(text, setting)[0]
        if name not in texts:
            given = "is given" if setting in ("kind", "anchor") else "are given"
            raise ValueError(f"`{setting}` {given} for '{name}', which is none of the texts: add it to them")
        found[name] = own
    return found


def _check_apart(concept: Concept, known: Mapping[str, Concept]) -> None:
    """Raise ValueError for a concept that says another one, or is said by it: nothing tells them apart for long."""
    for text, other in known.items():
        pairs = [(concept.name, spelling, other) for spelling in concept.spellings]
        pairs += [(text, spelling, concept) for spelling in other.spellings]
        for own, spelling, said in pairs:
            if says(spelling, said.spellings):
                shown = f"'{own}'" if spelling == own else f"'{spelling}', a spelling of '{own}',"
                raise ValueError(
                    f"{shown} says '{said.name}' too: erase them as one concept, with one of them among the other's "
                    "`aliases`"
                )
