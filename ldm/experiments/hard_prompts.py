"""The search for prompts of a vocabulary's words under which a model draws what images show."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ldm.config.concepts import Concept, identity_of
from ldm.config.robustness import HardPromptConfig
from ldm.diffusion.model import DiffusionModel
from ldm.diffusion.tokenizer import vocabulary_words
from ldm.experiments.attacks import NoisedImages, denoising_losses

_SHORTEST = 3  # letters of a name's word without which a longer word does not say it


@dataclass(frozen=True)
class FoundPrompt:
    """A prompt that a search found, its loss, and that of the prompt from which the search set out."""

    prompt: str
    loss: float
    start_loss: float


def search_words(tokenizer: Any, excluded: Concept | None = None) -> list[str]:
    """Return the words of a tokenizer's vocabulary that it reads as one token each, and writes as they are.

    Those are left out that are within a spelling of the concept `excluded`, or have a word of one within them.
    """
    texts = [identity_of(spelling) for spelling in excluded.spellings] if excluded else []
    pieces = {identity_of(piece) for spelling in (excluded.spellings if excluded else ()) for piece in spelling.split()}
    names = {*texts, *(piece for piece in pieces if len(piece) >= _SHORTEST)}

    def is_free(word: str) -> bool:
        identity = identity_of(word)
        return not any(identity in text for text in texts) and not any(name in identity for name in names)

    words = [word for word in vocabulary_words(tokenizer) if is_free(word)]
    ids = tokenizer(words, add_special_tokens=False, verbose=False).input_ids if words else []
    return [
        word for word, own in zip(words, ids, strict=True) if len(own) == 1 and tokenizer.decode(own).strip() == word
    ]


class HardPromptSearch:
    """Greedy coordinate search over words, by the gradient and then by the loss itself.

    The gradient with respect to a word's embedding says which others may lessen the loss (HotFlip, Ebrahimi et al.,
    arXiv 1712.06751); some of the likeliest are tried, and the best one is kept where it does (GCG, Zou et al.,
    arXiv 2307.15043). A model of several text encoders gives the gradient of the first one's.
    """

    def __init__(self, model: DiffusionModel, noised: NoisedImages, words: Sequence[str], config: HardPromptConfig):
        self.model, self.noised, self.words, self.config = model, noised, words, config
        tokenizer = model.tokenizers[0]
        self._ids = torch.tensor([tokenizer(word, add_special_tokens=False).input_ids[0] for word in words])
        encoder = model.text_encoders[model.sources[0].name]
        self._embedding: nn.Embedding = encoder.get_input_embeddings()
        own = (module for module in encoder.modules() if getattr(module, "weight", None) is self._embedding.weight)
        self._hooked = [module for module in own if isinstance(module, nn.Embedding)]  # T5 has one within it too

    def find(self, template: Callable[[Sequence[str]], str], seed: str) -> FoundPrompt:
        """Return the best prompt of one search; `template` makes a prompt of its words, and `seed` says all chance."""
        chance = random.Random(seed)
        words = chance.choices(self.words, k=self.config.hard_words)
        start = loss = self._losses([template(words)])[0]
        for _ in range(self.config.hard_iterations):
            changes = self._changes(words, template)
            tried = [
                [*words[:k], word, *words[k + 1 :]]
                for k, word in chance.sample(changes, min(len(changes), self.config.hard_candidates))
            ]
            if not tried:  # every word is cut off
                break
            losses = self._losses([template(each) for each in tried])
            best = min(range(len(tried)), key=losses.__getitem__)
            if losses[best] < loss:
                words, loss = tried[best], losses[best]
        return FoundPrompt(template(words), loss, start)

    @torch.no_grad()
    def _losses(self, prompts: list[str]) -> list[float]:
        return denoising_losses(self.model, self.noised, self.model.embed(prompts)).tolist()

    def _changes(self, words: list[str], template: Callable[[Sequence[str]], str]) -> list[tuple[int, str]]:
        """Return the likeliest changes, each a place and the word that comes there."""
        others = [next(word for word in self.words if word != own) for own in words]
        variants: list[list[str]] = [[*words[:k], other, *words[k + 1 :]] for k, other in enumerate(others)]
        seen: list[tuple[torch.Tensor, torch.Tensor]] = []

        def follow(_: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
            seen.append((inputs[0], output.detach().requires_grad_()))
            return seen[-1][1]

        with ExitStack() as stack:
            for module in self._hooked:
                stack.callback(module.register_forward_hook(follow).remove)
            # The variants tell at which token each word is, whatever a pipeline puts around a prompt.
            embeds = self.model.embed([template(each) for each in (words, *variants)])
        ids, embedded = seen[0]
        loss = denoising_losses(self.model, self.noised, embeds[:1])
        gradient = torch.autograd.grad(loss.sum(), embedded)[0][0]  # (tokens, width)
        weights = self._embedding.weight[self._ids.to(gradient.device)]  # (words, width)
        changes = []
        for k, ids_of_variant in enumerate(ids[1:]):
            differs = (ids_of_variant != ids[0]).nonzero()
            if not len(differs):  # a word that is cut off
                continue
            order = (weights @ gradient[differs[0, 0]]).argsort(stable=True)[: self.config.hard_top_words].tolist()
            changes += [(k, self.words[n]) for n in order if self.words[n] != words[k]]
        return changes
