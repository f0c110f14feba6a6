"""What a linear shift should change little, though no null space protects it: everyday prompts, as a retain set."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch

from ldm.config.concepts import Concept
from ldm.config.everyday import retain_captions
from ldm.config.methods import SRSMEConfig
from ldm.config.spellings import says
from ldm.config.templates import fill, load_template_set
from ldm.diffusion.model import DiffusionModel
from ldm.diffusion.tokenizer import vocabulary_words

_NUM_CAPTIONS = 1000
_COMPOSED = 3  # captions in which each composed template says a concept, or a neutral word
_NUM_NAMES = 220  # made-up names, which stand for all that nobody lists


class RetainSet:
    """Everyday captions, neutral prompts, and prompts that say the other concepts, as moments of their embeddings.

    Neutral prompts say a neutral word, or a made-up name, as others say a concept. `others` are the concepts whose
    prompts are retained unless it is their own erasure. The moments of prompts are the mean of `e^T e` over them,
    (d, d), float64, with e (tokens, d) the embedding of one.
    """

    def __init__(self, model: DiffusionModel, others: Sequence[Concept]):
        self.model, self.others = model, others
        self.captions = retain_captions(_NUM_CAPTIONS)
        self._moments: dict[tuple[str, ...], torch.Tensor] = {}

    def cost(self, concept: Concept, config: SRSMEConfig) -> torch.Tensor:
        """Return the sum of the moments by the weights of `config`: what a concept's change of them costs, (d, d)."""
        total = torch.zeros(self.model.context_dim, self.model.context_dim, dtype=torch.float64)
        if config.vocab_preserve_scale:
            total += config.vocab_preserve_scale * self.model.vocab_gram_without(*concept.spellings)
        if config.captions_preserve_scale:
            captions = [text for text in self.captions if not says(text, concept.spellings)]
            total += config.captions_preserve_scale * self._mean([captions])
        if config.neutral_preserve_scale:
            total += config.neutral_preserve_scale * self._mean([self._neutral_prompts(concept)])
        others = [other for other in self.others if other != concept]
        if config.others_preserve_scale and others:
            prompts = []
            for other in others:
                said = self._saying(other.kind, other.prompt)
                prompts.append([text for text in said if not says(text, concept.spellings)])
            total += config.others_preserve_scale * self._mean(prompts)
        return total

    def _neutral_prompts(self, concept: Concept) -> list[str]:
        """Return prompts that say the neutral word of a concept's kind, and made-up names, in its kind's templates."""
        kind = load_template_set(concept.kind)
        words, rng = vocabulary_words(self.model.tokenizers[0]), random.Random(0)
        names = [" ".join(rng.sample(words, 2)).title() for _ in range(_NUM_NAMES)] if len(words) > 1 else []
        own = {word.lower() for spelling in concept.spellings for word in spelling.split()}
        names = [name for name in names if own.isdisjoint(name.lower().split())]
        made_up = [fill(kind.templates[k % len(kind.templates)], name) for k, name in enumerate(names)]
        return self._saying(concept.kind, kind.neutral) + made_up

    def _saying(self, kind: str, name: str) -> list[str]:
        """Return prompts that say a name: its kind's templates, and some captions."""
        templates = load_template_set(kind)
        prompts = [fill(template, name) for template in templates.templates]
        captions = iter(self.captions)
        composed = [text.replace("{caption}", next(captions)) for text in templates.composed_templates * _COMPOSED]
        return prompts + [fill(template, name) for template in composed]

    def _mean(self, groups: Sequence[Sequence[str]]) -> torch.Tensor:
        """Return the moments over all prompts of the groups; those of each group are computed once."""
        total = torch.zeros(self.model.context_dim, self.model.context_dim, dtype=torch.float64)
        for group in groups:
            key = tuple(group)
            if key not in self._moments:
                self._moments[key] = self.model.prompt_gram(group)
            total += self._moments[key]
        return total / max(1, sum(len(group) for group in groups))
