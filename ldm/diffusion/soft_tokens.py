"""Soft tokens: vectors in place of the input embeddings of a few words, as a user of a learnt embedding has them.

That is textual inversion (Gal et al., arXiv 2208.01618). No tokenizer and no weight changes: forward hooks put the
vectors in place of the rows of words that stand for them, so that all that acts on prompts acts on them too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from ldm.diffusion.text_model import TextModel


@dataclass(frozen=True)
class Placeholders:
    """A prompt of words that soft tokens stand for, and the ids of its tokens by text encoder, one of each word."""

    prompt: str
    ids: Mapping[str, list[int]]


def find_placeholders(model: TextModel, number: int) -> Placeholders:
    """Return words that are one token by each of a model's tokenizers, the last of the vocabulary first.

    Raises ValueError where a model does not have so many.
    """
    tokenizers = dict(zip(model.text_encoders, model.tokenizers, strict=True))
    taken = {name: set(tokenizer("").input_ids) for name, tokenizer in tokenizers.items()}  # by a template
    vocabulary = model.tokenizers[0].get_vocab()
    words: list[str] = []
    ids: dict[str, list[int]] = {}
    for token in sorted(vocabulary, key=lambda token: -vocabulary[token]):
        word = token.removesuffix("</w>").lstrip("▁Ġ#")
        if len(word) < 3 or not (word.isascii() and word.isalpha() and word.islower()):
            continue
        prompt = " ".join([*words, word])
        found = {name: list(each(prompt, add_special_tokens=False).input_ids) for name, each in tokenizers.items()}
        if all(len({*own} - taken[name]) == len(own) == len(words) + 1 for name, own in found.items()):
            words.append(word)
            ids = found
        if len(words) == number:
            return Placeholders(prompt, ids)
    raise ValueError(f"{model.name} has no {number} words that are one token each: give fewer soft tokens")


@contextmanager
def soft_tokens(model: TextModel, words: Placeholders, vectors: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """While the block runs, let each text encoder read `vectors` (k, width) where the k words stand in a prompt."""

    def make_hook(ids: list[int], rows: torch.Tensor) -> Any:
        def replace(_: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
            for number, row in zip(ids, rows.to(output), strict=True):
                output = torch.where((inputs[0] == number)[..., None], row, output)  # (N, T, width)
            return output

        return replace

    with ExitStack() as stack:
        for name, encoder in model.text_encoders.items():
            hook, weight = make_hook(words.ids[name], vectors[name]), encoder.get_input_embeddings().weight
            for module in encoder.modules():  # T5 reads by another one of the same weight
                if isinstance(module, torch.nn.Embedding) and module.weight is weight:
                    stack.callback(module.register_forward_hook(hook).remove)
        yield
