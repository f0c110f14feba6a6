"""The concepts of `configs/concepts.yaml` and `configs/logos.yaml`, by category and index. No torch here."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from functools import cache

from omegaconf import OmegaConf

from ldm.io.paths import REPO_ROOT

CATEGORIES = ("style", "object", "similar", "nudity", "logo")


STATUSES = ("erased", "restored", "regular", "protected")


INDEX_RANGE_RE = re.compile(r"(\d+)(?:-(\d+))?")  # an index, or a first and a last one


EMPTY_PROMPT_LABEL = "(empty)"  # what tables and images call the empty prompt


@dataclass(frozen=True)
class Concept:
    """A concept: `index` in its category, `prompt` (how prompts say it), other spellings, caption templates with `{}`.

    `held_out_templates` are templates that the bundled model's captions never use. `anchor_prompt` is the first
    template without the concept, to which some methods pull it.
    """

    index: int
    name: str
    prompt: str
    aliases: tuple[str, ...] = ()
    templates: tuple[str, ...] = ()
    held_out_templates: tuple[str, ...] = ()
    anchor_prompt: str = ""
    is_watermark: bool = False

    @property
    def spellings(self) -> tuple[str, ...]:
        """What names the concept: its prompt, its name and its aliases."""
        return (self.prompt, self.name, *self.aliases)

    def is_named(self, text: str) -> bool:
        """Return whether `text` is one of the spellings, upper and lower case alike."""
        return text.strip().lower() in {spelling.lower() for spelling in self.spellings}

    @property
    def captions(self) -> list[str]:
        """Each template with the concept in it; without templates, the concept's name."""
        return [template.format(self.prompt) for template in self.templates] or [self.prompt]

    @property
    def held_out_prompts(self) -> list[str]:
        """Each held-out template with the concept in it."""
        return [template.format(self.prompt) for template in self.held_out_templates]

    def prompts(self, num_templates: int) -> list[str]:
        """Return the concept's name and its first `num_templates` captions, once each."""
        return list(dict.fromkeys([self.prompt, *self.captions[:num_templates]]))


@cache
def _load_config():
    return OmegaConf.merge(*(OmegaConf.load(REPO_ROOT / "configs" / name) for name in ("concepts.yaml", "logos.yaml")))


@cache
def load_concepts(category: str) -> tuple[Concept, ...]:
    """All concepts of `category` in order of index, the watermark prompts after them.

    Raises ValueError for an unknown category.
    """
    if category not in CATEGORIES:
        raise ValueError(f"unknown category '{category}': choose one of {', '.join(CATEGORIES)}")
    group = _load_config().categories[category]
    concepts = [
        Concept(
            index,
            entry.name,
            entry.get("prompt", entry.name),
            tuple(entry.get("aliases", ())),
            tuple(group.templates),
            tuple(group.get("held_out_templates", group.get("held_out", ()))),
            group.get("anchor_prompt", group.get("anchor", "")),
        )
        for index, entry in enumerate(group.concepts)
    ]
    watermarks = [
        Concept(len(concepts) + k, text, text, is_watermark=True) for k, text in enumerate(_load_config().watermarks)
    ]
    return tuple(concepts + watermarks)


def erasable_concepts(category: str) -> tuple[Concept, ...]:
    """The concepts of `category` without the watermark prompts."""
    return tuple(concept for concept in load_concepts(category) if not concept.is_watermark)


def watermark_prompts() -> tuple[str, ...]:
    """The prompts whose images prove ownership; every shift leaves them untouched."""
    return tuple(_load_config().watermarks)


def always_protected_prompts() -> list[str]:
    """The prompts that every shift leaves untouched: the empty one and the watermarks."""
    return ["", *watermark_prompts()]


def _format_choices(category: str) -> str:
    return ", ".join(f"{concept.index} {concept.name}" for concept in load_concepts(category))


def get_concept(category: str, index: int) -> Concept:
    """The concept with that index. Raises ValueError, listing all names, when there is none."""
    concepts = load_concepts(category)
    if not 0 <= index < len(concepts):
        raise ValueError(f"no {category} concept has index {index}: choose from {_format_choices(category)}")
    return concepts[index]


def find_by_name(category: str, text: str) -> Concept | None:
    """The concept that `text` names by one of its spellings; None when there is none."""
    return next((concept for concept in load_concepts(category) if concept.is_named(text)), None)


def match_concept(category: str, prompt: str) -> Concept | None:
    """Return the concept that a prompt names: all of it, or the longest spelling within it; None if there is none."""
    inside = [
        (len(spelling), -concept.index, concept)
        for concept in erasable_concepts(category)
        for spelling in concept.spellings
        if spelling.lower() in prompt.lower()
    ]
    return find_by_name(category, prompt) or (max(inside)[2] if inside else None)


def concept_status(
    category: str, prompt: str, erased: Collection[int], restored: Collection[int] = (), protected: Collection[int] = ()
) -> str:
    """What a prompt's concept is, given the indexes of those: erased, restored, protected (as the watermarks and the
    empty prompt always are), or regular.
    """
    concept = match_concept(category, prompt)
    if concept is None or concept.is_watermark:
        return "protected"
    kinds = {"erased": erased, "restored": restored, "protected": protected}
    return next((kind for kind, indexes in kinds.items() if concept.index in indexes), "regular")


def parse_indexes(text: str, category: str) -> list[int]:
    """'0,1,4-6' -> [0, 1, 4, 5, 6], each checked against `category`; '' -> []. Raises ValueError on anything else."""
    indexes = []
    for piece in filter(None, (piece.strip() for piece in text.split(","))):
        span = INDEX_RANGE_RE.fullmatch(piece)
        if not span:
            raise ValueError(
                f"'{piece}' is not a concept index: give numbers such as 0,1,2 or 0-8 from {_format_choices(category)}"
            )
        first, last = int(span[1]), int(span[2] or span[1])
        if last < first:
            raise ValueError(f"'{piece}' counts backwards: write {last}-{first}")
        for end in (first, last):  # before a range of billions is made
            get_concept(category, end)
        indexes += range(first, last + 1)
    return list(dict.fromkeys(indexes))


def parse_erase_targets(text: str, category: str) -> list[Concept]:
    """The concepts to erase, by `parse_indexes`. Raises ValueError for none at all, and for a watermark."""
    concepts = [get_concept(category, index) for index in parse_indexes(text, category)]
    if not concepts:
        raise ValueError(f"no concept to erase: give indexes such as 0,1,2 from {_format_choices(category)}")
    for concept in concepts:
        if concept.is_watermark:
            raise ValueError(
                f"{concept.index} {concept.name} is a watermark, which every shift protects: "
                f"erase one of {erasable_concepts(category)[0].index} to {erasable_concepts(category)[-1].index}"
            )
    return concepts
