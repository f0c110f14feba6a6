"""What a linear shift should change little, though no null space protects it: everyday prompts, as a retain set."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch

from ldm.config.concepts import Concept
from ldm.config.everyday import retain_captions
from ldm.config.methods import SRSMEConfig
from ldm.config.spellings import says
from ldm.config.templates import fill, load_template_set
from ldm.diffusion.text_model import TextModel
from ldm.diffusion.tokenizer import vocabulary_words
from ldm.io.errors import notify

_NUM_CAPTIONS = 1000
_COMPOSED = 3  # captions in which each composed template says a concept, or a neutral word
_NUM_NAMES = 220  # made-up names, which stand for all that nobody lists
_SHOWN = 3  # prompts in a notice


class RetainSet:
    """Everyday captions, neutral prompts, prompts that say the other concepts, and prompts of the user's own.

    Neutral prompts say a neutral word, or a made-up name, as others say a concept. `others` are the concepts whose
    prompts are retained unless it is their own erasure, and `prompts` those of the user, but for those that say what is
    erased.
    """

    def __init__(self, model: TextModel, others: Sequence[Concept], prompts: Sequence[str] = ()):
        self.model, self.others = model, others
        self.prompts = list(dict.fromkeys(prompts))
        self._grams: dict[tuple[str, ...], torch.Tensor] = {}

    @cached_property
    def captions(self) -> list[str]:
        """Everyday captions of the grammar that erasures are fitted on."""
        return retain_captions(_NUM_CAPTIONS)

    def cost(self, concept: Concept, config: SRSMEConfig, num_targets: int) -> torch.Tensor:
        """Return what a change of the retain set costs where a concept has `num_targets` prompts, (d, d), float64.

        For each of these it is the sum, by the scales of `config`, of the mean over each group's prompts of `e^T e`,
        with e (tokens, d) the embedding of one.
        """
        total = torch.zeros(self.model.context_dim, self.model.context_dim, dtype=torch.float64)
        if config.vocab_preserve_scale:
            total += config.vocab_preserve_scale * num_targets * self.model.vocab_gram_without(*concept.spellings)
        for scale, parts in self.groups(concept, config):
            number = sum(len(part) for part in parts)
            for part in parts:
                total += scale * num_targets / number * self._gram(part)
        left_out = _prompts_saying(self.prompts, concept)
        number = len(self.prompts) - len(left_out)
        if config.retain_preserve_scale and number:
            gram = self._gram(self.prompts) - self._gram(left_out)  # so that for no concept all are embedded again
            total += config.retain_preserve_scale * num_targets / number * gram
        return total

    def metadata(self, targets: Mapping[str, str], concept: Concept, config: SRSMEConfig) -> dict[str, Any]:
        """Return what a shift's file says of the prompts that it is made of, `targets` with their anchors among them.

        That is a digest of all that are taken from concepts, templates, grammars and the user, and of the user's alone
        their number and digest.
        """
        content: list[Any] = [list(targets.items()), self.groups(concept, config)]
        if not self.prompts:
            return {"prompts_digest": _digest(content)}
        own = {"prompts": len(self.prompts), "digest": _digest(self.prompts)}
        return {"prompts_digest": _digest([*content, self.prompts]), "retain": own}

    def groups(self, concept: Concept, config: SRSMEConfig) -> list[tuple[float, list[list[str]]]]:
        """Return the groups of prompts that are retained, in parts, each group with its scale.

        None of them says the concept. The words of the vocabulary, and the user's prompts, are not among them.
        """
        found: list[tuple[float, list[list[str]]]] = []
        if config.captions_preserve_scale:
            found.append((config.captions_preserve_scale, [self.captions]))
        if config.neutral_preserve_scale:
            found.append((config.neutral_preserve_scale, [self._neutral_prompts(concept)]))
        if config.others_preserve_scale:
            others = [other for other in self.others if other != concept]
            found.append((config.others_preserve_scale, [self._saying(other.kind, other.prompt) for other in others]))
        without: list[tuple[float, list[list[str]]]] = []
        for scale, parts in found:
            parts = [[text for text in part if not says(text, concept.spellings)] for part in parts]
            if any(parts):
                without.append((scale, parts))
        return without

    @cached_property
    def _made_up_names(self) -> list[str]:
        words, rng = vocabulary_words(self.model.tokenizers[0]), random.Random(0)
        return [" ".join(rng.sample(words, 2)).title() for _ in range(_NUM_NAMES)] if len(words) > 1 else []

    def _neutral_prompts(self, concept: Concept) -> list[str]:
        """Return prompts that say the neutral word of a concept's kind, and made-up names, in its kind's templates."""
        kind = load_template_set(concept.kind)
        own = {word.lower() for spelling in concept.spellings for word in spelling.split()}
        names = [name for name in self._made_up_names if own.isdisjoint(name.lower().split())]
        made_up = [fill(kind.templates[k % len(kind.templates)], name) for k, name in enumerate(names)]
        return self._saying(concept.kind, kind.neutral) + made_up

    def _saying(self, kind: str, name: str) -> list[str]:
        """Return prompts that say a name: its kind's templates, and some captions."""
        templates = load_template_set(kind)
        prompts = [fill(template, name) for template in templates.templates]
        captions = iter(self.captions)
        composed = [text.replace("{caption}", next(captions)) for text in templates.composed_templates * _COMPOSED]
        return prompts + [fill(template, name) for template in composed]

    def _gram(self, prompts: Sequence[str]) -> torch.Tensor:
        """Return the sum of `e^T e` over prompts, computed once for each list of them."""
        key = tuple(prompts)
        if key not in self._grams:
            self._grams[key] = self.model.prompt_gram(prompts)
        return self._grams[key]


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _prompts_saying(prompts: Iterable[str], concept: Concept) -> list[str]:
    return [prompt for prompt in prompts if says(prompt, concept.spellings)]


def notify_of_left_out(prompts: Iterable[str], concepts: Iterable[Concept]) -> None:
    """Say which of a user's prompts the erasures of concepts do not retain: those that say the concept."""
    shown: list[str] = []
    for concept in concepts:
        shown += [f"'{prompt}' ({concept.name})" for prompt in _prompts_saying(prompts, concept)]
    if shown:
        more = f" and {len(shown) - _SHOWN} more" if len(shown) > _SHOWN else ""
        notify(f"`retain` is without the prompts that say what is erased: {', '.join(shown[:_SHOWN])}{more}")
