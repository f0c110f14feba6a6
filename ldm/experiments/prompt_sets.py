"""Prompts that gates are judged by: captions, kin names, near misses, and those that say the concepts of a list.

Those that are made of a name say it; which other names of the list stand in a prompt is seen in its text.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ldm.config.concepts import Concept
from ldm.config.everyday import everyday_captions, kin_names, near_misses
from ldm.config.spellings import misspellings, respellings, says, shared_last_words
from ldm.config.templates import fill, load_template_set
from ldm.diffusion.tokenizer import read_part
from ldm.io.prompts import read_prompt_csv

HELD_OUT, TEMPLATES, MISSPELT, RESPELT = "held-out templates", "templates", "misspelt names", "other spellings"
CAPTIONS, KIN, NEAR_MISSES = "everyday captions", "kin names", "near misses"
SHARED, RESTORED = "shared last names", "restored concepts"
_CAPTION_SEED = 1  # those of 0 are what a gate's own report counts
_NUM_MISSPELT, _MAX_MISSPELT = 40, 8000  # misspelt names of each concept, and of a long list in all
_NUM_COMPOSED = 40  # captions with a restored concept in them, of each spelling
_WORD_RE = re.compile(r"\w+")


@dataclass(frozen=True)
class PromptSet:
    """Prompts of one kind. Where they are made for a concept, `owners` has its place in the list for each of them."""

    name: str
    prompts: Sequence[str]
    owners: Sequence[int] = ()

    @property
    def has_own_names(self) -> bool:
        """Whether the prompts are made of the names of the list."""
        return self.name in (HELD_OUT, TEMPLATES, MISSPELT, RESPELT, SHARED, RESTORED)


def read_captions(paths: Iterable[Path]) -> list[PromptSet]:
    """Return the prompts of each file under its name, or under its path where another has that name.

    They are those of a prompt list where it is a CSV file, else one a line. Raises ValueError for a file that is no
    text in UTF-8, or has no prompt.
    """
    paths = list(dict.fromkeys(paths))
    names = [path.name for path in paths]
    return [PromptSet(path.name if names.count(path.name) == 1 else str(path), _read(path)) for path in paths]


def _read(path: Path) -> list[str]:
    """Return the prompts of a file, once each."""
    if path.suffix.lower() == ".csv":
        prompts = [case.prompt for case in read_prompt_csv(path)]
    else:
        try:
            lines = path.read_text(encoding="utf-8-sig").splitlines()
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is no text in UTF-8: save it so, one caption a line") from error
        prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ValueError(f"{path} has no captions: give one a line, or a prompt list")
    return list(dict.fromkeys(prompts))


def make_prompt_sets(
    concepts: Sequence[Concept], num_captions: int, tokenizer: Any, restored: Sequence[Concept] = ()
) -> list[PromptSet]:
    """Return the prompts that gates are judged by: some that say no concept, and some that say each of them.

    What says one of `restored` is a set of its own, and so are last names alone that several concepts share. None that
    is made of a name of `concepts`, or says `restored`, is longer than what the tokenizer reads. Misspelt names may be
    among those that a gate was fitted on; the templates that say them are not.
    """
    generic = load_template_set("generic").held_out_templates
    kin: list[str] = []
    for name in kin_names():
        kin += [name, *(fill(template, name) for template in generic)]
    made: dict[str, dict[str, int]] = {HELD_OUT: {}, TEMPLATES: {}, MISSPELT: {}, RESPELT: {}}
    num_misspelt = min(_NUM_MISSPELT, -(-_MAX_MISSPELT // len(concepts)))
    for number, concept in enumerate(concepts):
        for name, prompts in _own_prompts(concept, num_misspelt).items():
            for prompt in prompts:
                if read_part(tokenizer, prompt) is None:
                    made[name].setdefault(prompt, number)
    sets = [
        PromptSet(CAPTIONS, everyday_captions(num_captions, _CAPTION_SEED)),
        PromptSet(KIN, kin),
        PromptSet(NEAR_MISSES, list(near_misses())),
        *(PromptSet(name, list(found), list(found.values())) for name, found in made.items()),
    ]
    shared = shared_last_words({concept.name: concept.spellings for concept in (*concepts, *restored)})
    if shared:
        alone = load_template_set("person").held_out_templates
        sets.append(PromptSet(SHARED, [fill(template, name) for name in shared for template in ("{}", *alone)]))
    if restored:
        said = [prompt for prompt in _restored_prompts(restored) if read_part(tokenizer, prompt) is None]
        sets.append(PromptSet(RESTORED, said))
    return sets


def _restored_prompts(concepts: Sequence[Concept]) -> list[str]:
    """Return prompts that say concepts: their templates, held-out ones, and everyday captions with a name in them."""
    captions = [caption.rstrip(".?") for caption in everyday_captions(_NUM_COMPOSED, _CAPTION_SEED)]
    prompts: list[str] = []
    for concept in concepts:
        own, kind = _own_prompts(concept, 0), load_template_set(concept.kind)
        prompts += [*own[TEMPLATES], *own[HELD_OUT]]
        for spelling in concept.spellings:
            for number, caption in enumerate(captions):
                template = kind.composed_templates[number % len(kind.composed_templates)]
                prompts.append(fill(template.replace("{caption}", caption), spelling))
    return list(dict.fromkeys(prompts))


def _own_prompts(concept: Concept, num_misspelt: int) -> dict[str, list[str]]:
    """Return the prompts that say a concept, by the name of the set, `num_misspelt` of them wrongly."""
    kind = load_template_set(concept.kind)
    held_out = [*kind.held_out_templates, *concept.held_out_templates]
    wrong: list[str] = []
    for spelling in concept.spellings:
        wrong += [text for text in misspellings(spelling) if not says(text, concept.spellings)]
    wrong = list(dict.fromkeys(wrong))
    random.Random(concept.name).shuffle(wrong)
    misspelt = [fill(held_out[k % len(held_out)], text) for k, text in enumerate(wrong[:num_misspelt])]
    own: dict[str, list[str]] = {HELD_OUT: [], TEMPLATES: [], MISSPELT: misspelt, RESPELT: []}
    for spelling in concept.spellings:
        own[RESPELT] += [fill(held_out[k % len(held_out)], text) for k, text in enumerate(respellings(spelling))]
        own[HELD_OUT] += [fill(template, spelling) for template in held_out]
        own[TEMPLATES] += [fill(template, spelling) for template in (*kind.templates, *concept.templates)]
    return own


class NameIndex:
    """The names of concepts by their first words, so that of a thousand only those are sought that a prompt may say."""

    def __init__(self, concepts: Sequence[Concept]):
        self.concepts = concepts
        self._numbers: dict[str, set[int]] = {}
        for number, concept in enumerate(concepts):
            for spelling in concept.spellings:
                words = _WORD_RE.findall(spelling.lower())
                self._numbers.setdefault(words[0] if words else "", set()).add(number)

    def find(self, prompts: Sequence[str]) -> torch.Tensor:
        """Return which concepts' spellings stand in each prompt, (N, C) bool."""
        found = torch.zeros(len(prompts), len(self.concepts), dtype=torch.bool)
        for row, prompt in zip(found, prompts, strict=True):
            for word in {"", *_WORD_RE.findall(prompt.lower())}:
                for number in self._numbers.get(word, ()):
                    row[number] |= says(prompt, self.concepts[number].spellings)
        return found


def find_names(prompts: Sequence[str], concepts: Sequence[Concept]) -> torch.Tensor:
    """Return which concepts' spellings stand in each prompt, (N, C) bool."""
    return NameIndex(concepts).find(prompts)


def find_said(prompt_set: PromptSet, concepts: Sequence[Concept], tokenizer: Any) -> torch.Tensor:
    """Return which concepts each prompt says as far as the model reads it, or is made for, (N, C) bool.

    A near miss says none, also where it has the word: "grilled pollock fillet" is about a fish.
    """
    said = torch.zeros(len(prompt_set.prompts), len(concepts), dtype=torch.bool)
    if prompt_set.name != NEAR_MISSES:
        said = find_names([read_part(tokenizer, prompt) or prompt for prompt in prompt_set.prompts], concepts)
    for number, owner in enumerate(prompt_set.owners):
        said[number, owner] = True
    return said
