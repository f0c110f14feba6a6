"""Which prompts say a concept, and which do not, as its gate is fitted to tell."""

from __future__ import annotations

import hashlib
import itertools
import json
import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch

from ldm.config.concepts import Concept, always_protected_prompts
from ldm.config.everyday import ordinary_words, plural, prompt_modifiers, retain_captions
from ldm.config.methods import GateConfig
from ldm.config.spellings import compounds, lookalikes, misspellings, partial_names, says, shared_last_words
from ldm.config.templates import fill, fill_anchor, fill_phrase, load_template_set, without_article
from ldm.diffusion.tokenizer import last_piece, last_token, read_part, vocabulary_words
from ldm.io.errors import notify

Item = TypeVar("Item")

_NUM_UNSEEN = 800  # made-up words by which a state is chosen, and of which a gate may take few
_OTHER_TEMPLATES = 3  # by which prompts say the concepts that are not erased
_NUM_LOOKALIKES = 60  # made-up words for each spelling
_MAX_SAYING = 0.2  # the largest fraction of captions that may say a concept
_NUM_COMPOSED = 4  # captions with another concept's names in them
_NUM_NAMESAKES = 20  # of them, for one whose last name others have
_MAX_SHOWN = 5  # shared names in a notice
_NUM_MODIFIED = 180  # captions that have prompt modifiers too, each other ones
_MAX_LISTED = 6  # words of a list
_LIST_WEIGHT = 0.25  # of a list where a map is fitted: what becomes of sentences matters more
_OTHER_SURNAMES = 2  # after parts of the names of concepts that are not erased
_SURNAMES = ("Miller", "Jones", "Silva", "Petrov", "Larsen", "Kim", "Rossi", "Novak")  # of people who are no concept


@dataclass(frozen=True)
class OwnPrompts:
    """The prompts that say a concept as (prompt, name), the misspelt ones apart, and the anchor prompt of each.

    In the order of `all` are where each prompt's name ends, (N,), and how much it counts where a map is fitted, (N,).
    """

    plain: list[tuple[str, str]]
    misspelt: list[tuple[str, str]]
    anchors: dict[str, str]
    last_tokens: torch.Tensor
    weights: torch.Tensor

    @property
    def all(self) -> list[str]:
        return [prompt for prompt, _ in (*self.plain, *self.misspelt)]

    @property
    def by_name(self) -> dict[str, list[int]]:
        """Return the numbers of the prompts that say each name, of those that are not misspelt."""
        groups: dict[str, list[int]] = {}
        for number, (_, name) in enumerate(self.plain):
            groups.setdefault(name, []).append(number)
        return groups


class GatePrompts:
    """The prompts that the gates of all concepts of a model have in common, and those of each concept.

    `others` are concepts that a gate leaves alone unless it is its own, `retained` further prompts.
    """

    def __init__(self, tokenizer: Any, others: Sequence[Concept], retained: Sequence[str], config: GateConfig):
        self.tokenizer, self.config = tokenizer, config
        self.captions = retain_captions(config.retain_captions)
        words = vocabulary_words(tokenizer)
        if not words:
            raise ValueError("the model's tokenizer has no words, by which gates are fitted: erase without a gate")
        self.common = set(words)
        self.words = evenly(words, config.retain_words)
        made = compounds(words, config.retain_words + _NUM_UNSEEN)
        self.unseen, self.rare_words = made[:_NUM_UNSEEN], made[_NUM_UNSEEN:]
        modified = [_modified(caption, number) for number, caption in enumerate(self.captions[:_NUM_MODIFIED])]
        prompts = [*always_protected_prompts(), *self.captions, *modified, *self.words, *self.rare_words]
        for concept in others:
            prompts += _other_prompts(concept, self.common)
        self.shared = shared_last_words({concept.name: _names(concept) for concept in others})
        _notify_of_shared(self.shared)
        said_alone = load_template_set("person").templates
        self._shared_prompts = {fill(template, name) for name in self.shared for template in said_alone}
        namesakes = {name for found in self.shared.values() for name in found}
        for concept in others:
            prompts += self._composed(concept, _NUM_NAMESAKES if concept.name in namesakes else _NUM_COMPOSED)
        # What the null spaces of a run protect comes last: it is mostly there already, as each leaves one concept out.
        self.negatives = list(dict.fromkeys([*prompts, *sorted(self._shared_prompts), *sorted(retained)]))
        self._folded = {text: " ".join(text.lower().split()) for text in self.negatives}

    @property
    def digest(self) -> str:
        """Return the digest of the prompts that gates leave alone."""
        return hashlib.sha256(json.dumps(self.negatives).encode()).hexdigest()

    def _composed(self, concept: Concept, num: int) -> list[str]:
        """Return everyday captions with the names of a concept in them, by which gates tell it from others.

        Half of them have prompt modifiers.
        """
        rng, kind = random.Random(f"namesakes {concept.name}"), load_template_set(concept.kind)
        made: list[str] = []
        for number in range(num):
            name = concept.spellings[number % len(concept.spellings)]
            template = rng.choice(kind.composed_templates).replace("{caption}", rng.choice(self.captions))
            prompt, modified = fill_phrase(template, name), number // len(concept.spellings) % 2
            made.append(_modified(prompt, rng.randrange(_NUM_MODIFIED)) if modified else prompt)
        return made

    def _word_lists(self, concept: Concept, number: int) -> list[str]:
        """Return templates that are words of the vocabulary, in no order, with a concept's name anywhere among them."""
        rng, made = random.Random(f"lists {concept.name}"), list[str]()
        for _ in range(number):
            words = rng.sample(self.words, min(rng.randint(2, _MAX_LISTED), len(self.words)))
            words.insert(rng.randint(0, len(words)), "{}")
            made.append(" ".join(words))
        return made

    def without_shared(self, concept: Concept) -> Concept:
        """Return a concept without the other names of it that are other concepts' last names too."""
        shared = {name.lower() for name in self.shared}
        return replace(
            concept, aliases=tuple(alias for alias in concept.aliases if without_article(alias).lower() not in shared)
        )

    def own(self, concept: Concept, word_lists: int) -> OwnPrompts:
        """Return the prompts that say a concept, as far as the model reads all of them, and so many lists of words."""
        tokenizer, kind = self.tokenizer, load_template_set(concept.kind)
        rng = random.Random(f"compositions {concept.name}")
        templates = [*kind.templates, *concept.templates]
        spellings = told_apart(tokenizer, concept)
        said = [(template, spelling) for spelling in spellings for template in templates]
        for number in range(self.config.compositions):
            template = rng.choice(kind.composed_templates).replace("{caption}", rng.choice(self.captions))
            spelling = spellings[number // 2 % len(spellings)]
            modified = _modified(template, rng.randrange(_NUM_MODIFIED))
            is_read = read_part(tokenizer, fill_phrase(modified, spelling)) is None
            said.append((modified if number % 2 and is_read else template, spelling))
        lists = list(zip(self._word_lists(concept, word_lists), itertools.cycle(spellings), strict=False))
        wrong = [text for spelling in spellings for text in misspellings(spelling)]
        wrong = [text for text in dict.fromkeys(wrong) if not says(text, concept.spellings)]
        rng.shuffle(wrong)
        wrong = wrong[: self.config.misspellings]
        misspelt = [(templates[number % len(templates)], text) for number, text in enumerate(wrong)]
        anchors: dict[str, str] = {}
        groups: list[dict[str, str]] = [{}, {}, {}]
        for group, pairs in zip(groups, (said, lists, misspelt), strict=True):
            for template, name in pairs:
                prompt = fill_phrase(template, name)
                if prompt not in anchors and read_part(tokenizer, prompt) is None:
                    group[prompt] = name
                    anchors[prompt] = self.anchor(concept, template)
        if not groups[0]:  # as of lists some are shorter
            raise ValueError(
                f"'{concept.prompt}' is longer than the model's {tokenizer.model_max_length} tokens: give the "
                "concept a shorter name"
            )
        plain, wrongly = [*groups[0].items(), *groups[1].items()], list(groups[2].items())
        positions = [last_token(tokenizer, prompt, without_article(name)) or 0 for prompt, name in (*plain, *wrongly)]
        weights = [_LIST_WEIGHT if prompt in groups[1] else 1.0 for prompt, _ in (*plain, *wrongly)]
        return OwnPrompts(plain, wrongly, anchors, torch.tensor(positions), torch.tensor(weights))

    def anchor(self, concept: Concept, template: str) -> str:
        """Return what the prompt becomes that says a concept in a template."""
        if concept.anchor is None and self.config.gate_anchor == "empty":
            return ""
        return fill_anchor(template, concept.anchor, load_template_set(concept.kind).neutral)

    def lookalikes(self, concept: Concept) -> list[str]:
        """Return prompts that say nearly a concept: made-up words spelled much alike, and parts of its names."""
        templates, made = load_template_set(concept.kind).templates, []
        for spelling in dict.fromkeys(spelling.lower() for spelling in concept.spellings):
            tail = last_piece(self.tokenizer, spelling)
            made += lookalikes(spelling, self.words, _NUM_LOOKALIKES, tail)
        alike = [fill_phrase(templates[number % len(templates)], word) for number, word in enumerate(made)]
        return [text for text in (*alike, *_partial_prompts(concept, self.common)) if not says(text, concept.spellings)]

    def left_out(self, concept: Concept, own: OwnPrompts, prompts: Sequence[str]) -> torch.Tensor:
        """Return which of the prompts say a concept, or a part of its names, and so are none of its negatives, (N,).

        A part that is an ordinary word says something else, and what it says stays a negative.
        """
        names = _names(concept)
        own_texts = {*own.anchors, *_partial_prompts(concept, self.common, without=ordinary_words())}
        words = {word.lower() for name in names for word in name.split() if len(word) > 2} - ordinary_words()
        own_texts |= {text for text in self.words if text.lower() in words}  # a small vocabulary, or one with capitals
        own_texts |= {text for text in self.rare_words if any(word[:4] in text.lower() for word in words)}
        own_texts -= self._shared_prompts  # which say others as well
        folded = [" ".join(spelling.lower().split()) for spelling in concept.spellings]
        result = torch.zeros(len(prompts), dtype=torch.bool)
        for number, text in enumerate(prompts):
            known = self._folded.get(text) or " ".join(text.lower().split())
            is_near = any(name in known for name in folded)  # which is fast, and true of few
            result[number] = text in own_texts or (is_near and says(text, concept.spellings))
        return result


def told_apart(tokenizer: Any, concept: Concept) -> list[str]:
    """Return the spellings of a concept that a tokenizer tells apart. Raises ValueError where it keeps none."""
    empty, unknown, found = list(tokenizer("").input_ids), tokenizer.unk_token_id, {}
    in_lower_case = [spelling.lower() for spelling in concept.spellings]  # which many tokenizers do not tell apart
    for spelling in (*concept.spellings, *in_lower_case):
        ids = tokenizer(spelling).input_ids
        if list(ids) != empty and unknown not in tokenizer(spelling, add_special_tokens=False).input_ids:
            found.setdefault(tuple(ids), spelling)
    if not found:
        raise ValueError(f"the model's tokenizer keeps nothing of '{concept.prompt}': give the concept another name")
    return list(found.values())


def with_plurals(concept: Concept) -> Concept:
    """Return a concept with the plurals of its spellings among them, where it is an object, or may be one."""
    if concept.kind not in ("object", "generic"):
        return concept
    plurals: list[str] = []
    for spelling in dict.fromkeys(without_article(spelling) for spelling in concept.spellings):
        words = spelling.split()
        if concept.kind == "object" or (words and words[-1].islower()):  # and no proper name
            plurals.append(" ".join([*words[:-1], plural(words[-1])]))
    return replace(concept, aliases=(*concept.aliases, *(text for text in plurals if not concept.is_named(text))))


def evenly(items: Sequence[Item], num: int) -> list[Item]:
    """Return at most `num` of the items, evenly spaced."""
    num = min(num, len(items))
    return [items[k * len(items) // num] for k in range(num)]


def check_rare(concept: Concept, captions: Sequence[str]) -> None:
    """Raise ValueError for a name that many everyday captions say, such as a stop word."""
    saying = [text for text in captions if says(text, concept.spellings)]
    if len(saying) > _MAX_SAYING * len(captions):
        shown = ", ".join(f"'{text}'" for text in saying[:3])
        raise ValueError(
            f"'{concept.prompt}' is said by {len(saying)} of {len(captions)} everyday captions ({shown}): name the "
            "concept more narrowly"
        )


def _modified(prompt: str, number: int) -> str:
    """Return a prompt with one to three modifiers after it, other ones for the next number."""
    modifiers = prompt_modifiers()
    chosen = [modifiers[(number + 7 * place * place) % len(modifiers)] for place in range(1 + number % 3)]
    return ", ".join([prompt, *chosen])


def _other_prompts(concept: Concept, common: Collection[str]) -> list[str]:
    """Return prompts that say a concept by its name, by the neutral word of its kind, and by parts of its names."""
    kind = load_template_set(concept.kind)
    prompts = concept.prompts(len(concept.captions))  # all that a null space may protect, whatever is erased
    prompts += [fill(template, kind.neutral) for template in kind.templates]
    for name in concept.spellings:
        prompts += [fill_phrase(template, name) for template in kind.templates[:_OTHER_TEMPLATES]]
    return prompts + _partial_prompts(concept, common, _OTHER_SURNAMES)


def _partial_prompts(
    concept: Concept, common: Collection[str], num: int = len(_SURNAMES), without: Collection[str] = ()
) -> list[str]:
    """Return prompts that say parts of a concept's names, such as first names, alone and of somebody else."""
    templates, prompts = load_template_set(concept.kind).templates, []
    for part in partial_names(_names(concept), common):
        if part.lower() in without:
            continue
        prompts += [fill(template, part) for template in templates[:_OTHER_TEMPLATES]]
        prompts += [
            fill(template, f"{part} {name}") for name, template in zip(_SURNAMES[:num], templates, strict=False)
        ]
    return prompts


def _names(concept: Concept) -> list[str]:
    """Return the spellings of a concept, without an article that they begin with."""
    return [without_article(spelling) for spelling in concept.spellings]


def _notify_of_shared(shared: Mapping[str, Sequence[str]]) -> None:
    """Tell, in one line, which last words of names say several concepts."""
    if not shared:
        return
    told = [f"{word} ({', '.join(names)})" for word, names in shared.items()]
    more = f" and {len(told) - _MAX_SHOWN} more" if len(told) > _MAX_SHOWN else ""
    notify(
        f"said alone these names trip no gate, since each is of several concepts: {'; '.join(told[:_MAX_SHOWN])}{more}"
    )
