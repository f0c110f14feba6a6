"""The concepts of `configs/concepts.yaml` and `configs/many.yaml`, by category and index. No torch here."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from omegaconf import OmegaConf

ROOT = Path(__file__).resolve().parent.parent
CATEGORIES = ("style", "object", "similar", "nudity", "logo")
STATUSES = ("erased", "restored", "regular", "protected")
SPAN = re.compile(r"(\d+)(?:-(\d+))?")  # an index, or a first and a last one
BLANK = "(blank)"  # what tables and pictures call the blank prompt


@dataclass(frozen=True)
class Concept:
    """One concept: `index` in its category, `prompt` (its bare name), other spellings, caption templates with `{}`.

    `held_out` are templates that the embedded model's captions never use. `anchor` is the first template without the
    concept, to which some methods pull it.
    """

    index: int
    name: str
    prompt: str
    aliases: tuple[str, ...] = ()
    templates: tuple[str, ...] = ()
    held_out: tuple[str, ...] = ()
    anchor: str = ""
    watermark: bool = False

    @property
    def captions(self) -> list[str]:
        """Each template with the concept in it; without templates, the bare name."""
        return [template.format(self.prompt) for template in self.templates] or [self.prompt]


def said(concept: Concept, templates: int) -> list[str]:
    """A concept's bare name and its first `templates` captions, once each."""
    return list(dict.fromkeys([concept.prompt, *concept.captions[:templates]]))


@cache
def _config():
    return OmegaConf.merge(*(OmegaConf.load(ROOT / "configs" / name) for name in ("concepts.yaml", "many.yaml")))


@cache
def load_concepts(category: str) -> tuple[Concept, ...]:
    """All concepts of `category` in order of index, the watermark prompts after them.

    Raises ValueError for an unknown category.
    """
    if category not in CATEGORIES:
        raise ValueError(f"unknown category '{category}': choose one of {', '.join(CATEGORIES)}")
    group = _config().categories[category]
    concepts = [Concept(index, entry.name, entry.get("prompt", entry.name), tuple(entry.get("aliases", ())),
                        tuple(group.templates), tuple(group.held_out), group.anchor)
                for index, entry in enumerate(group.concepts)]
    marks = [Concept(len(concepts) + k, text, text, watermark=True) for k, text in enumerate(_config().watermarks)]
    return tuple(concepts + marks)


def erasable(category: str) -> tuple[Concept, ...]:
    """The concepts of `category` without the watermark prompts."""
    return tuple(concept for concept in load_concepts(category) if not concept.watermark)


def watermarks() -> tuple[str, ...]:
    """The prompts whose pictures prove ownership; every shift leaves them untouched."""
    return tuple(_config().watermarks)


def _listing(category: str) -> str:
    return ", ".join(f"{concept.index} {concept.name}" for concept in load_concepts(category))


def get_concept(category: str, index: int) -> Concept:
    """The concept with that index. Raises ValueError, listing all names, when there is none."""
    concepts = load_concepts(category)
    if not 0 <= index < len(concepts):
        raise ValueError(f"no {category} concept has index {index}: choose from {_listing(category)}")
    return concepts[index]


def find_concept(category: str, text: str) -> Concept | None:
    """The concept whose name, prompt or alias is `text`, upper and lower case alike; None when there is none."""
    wanted = text.strip().lower()
    for concept in load_concepts(category):
        if wanted in {spelling.lower() for spelling in (concept.name, concept.prompt, *concept.aliases)}:
            return concept
    return None


def concept_in(category: str, prompt: str) -> Concept | None:
    """The concept that a prompt names: all of the prompt, or the longest spelling within it; None when there is none."""
    inside = [(len(spelling), -concept.index, concept) for concept in erasable(category)
              for spelling in (concept.prompt, concept.name, *concept.aliases) if spelling.lower() in prompt.lower()]
    return find_concept(category, prompt) or (max(inside)[2] if inside else None)


def status(category: str, prompt: str, erased: Collection[int], restored: Collection[int] = (),
           protected: Collection[int] = ()) -> str:
    """What a prompt's concept is, given the indexes of those: erased, restored, protected (as the watermarks and the blank
    prompt always are), or regular."""
    concept = concept_in(category, prompt)
    if concept is None or concept.watermark:
        return "protected"
    kinds = {"erased": erased, "restored": restored, "protected": protected}
    return next((kind for kind, indexes in kinds.items() if concept.index in indexes), "regular")


def parse_indexes(text: str, category: str) -> list[int]:
    """'0,1,4-6' -> [0, 1, 4, 5, 6], each checked against `category`; '' -> []. Raises ValueError on anything else."""
    indexes = []
    for piece in filter(None, (piece.strip() for piece in text.split(","))):
        span = SPAN.fullmatch(piece)
        if not span:
            raise ValueError(f"'{piece}' is not a concept index: give numbers such as 0,1,2 or 0-8 from {_listing(category)}")
        first, last = int(span[1]), int(span[2] or span[1])
        if last < first:
            raise ValueError(f"'{piece}' counts backwards: write {last}-{first}")
        for end in (first, last):  # before a range of billions is made
            get_concept(category, end)
        indexes += range(first, last + 1)
    return list(dict.fromkeys(indexes))


def parse_erased(text: str, category: str) -> list[Concept]:
    """The concepts to erase, by `parse_indexes`. Raises ValueError for none at all, and for a watermark."""
    concepts = [get_concept(category, index) for index in parse_indexes(text, category)]
    if not concepts:
        raise ValueError(f"no concept to erase: give indexes such as 0,1,2 from {_listing(category)}")
    for concept in concepts:
        if concept.watermark:
            raise ValueError(f"{concept.index} {concept.name} is a watermark, which every shift protects: "
                             f"erase one of {erasable(category)[0].index} to {erasable(category)[-1].index}")
    return concepts


@dataclass(frozen=True)
class Moment:
    """One time of a scene: what is erased just then, and what stands erased, and restored, from then on."""

    time: int
    new: tuple[int, ...]
    erased: tuple[int, ...]
    restored: tuple[int, ...]


def load_scene(number: int) -> list[Moment]:
    """One scene of `configs/scenes.yaml`, time by time.

    Raises ValueError when there is none of that number, and for a time that erases what is erased or restores what is not.
    """
    scenes = OmegaConf.load(ROOT / "configs" / "scenes.yaml").scenes
    if number not in scenes:
        raise ValueError(f"no scene {number} in configs/scenes.yaml: choose from {', '.join(map(str, scenes))}")
    erased, restored, moments = set(), set(), []
    for time, change in enumerate(scenes[number]):
        new, back = set(change.get("erase", ())), set(change.get("restore", ()))
        if new & erased or not back <= erased:
            raise ValueError(f"configs/scenes.yaml, scene {number}, time {time}: it erases what is erased already, or "
                             "restores what is not erased: correct the file")
        erased, restored = erased - back | new, restored - new | back
        moments.append(Moment(time, tuple(sorted(new)), tuple(sorted(erased)), tuple(sorted(restored))))
    return moments
