"""Contradictions between what is erased and what is protected, found before any work: by text, and by embedding.

By embedding a protected prompt says a concept where a row of it is nearly the row of the name's last token. With m and
C the mean and the covariance of the rows of prompts that say no concept, it is so by the cosine of `C^(-1/2) (r - m)`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F

from ldm.config.concepts import Concept
from ldm.config.everyday import retain_captions
from ldm.config.spellings import says
from ldm.config.templates import fill, load_template_set
from ldm.diffusion.batches import encode_in_batches
from ldm.diffusion.text_model import TextModel
from ldm.diffusion.tokenizer import last_token

# On mini-sd-minilm, of five concepts: 0.83 and more of captions that say one, and 0.30 at most of all other prompts.
# Where the rows of prompts that say no concept come near, as in mini-sd's own small text encoder, none is named.
SAME_CONCEPT = 0.6
_CLEARANCE = 0.1  # above every prompt that says no concept
_NUM_CAPTIONS = 40  # of those prompts, beside the neutral ones
_RIDGE = 0.1  # of the covariance, relative to its mean eigenvalue
_SHOWN = 3


def find_by_text(concept: Concept, protected: Iterable[str]) -> list[str]:
    """Return the protected prompts that say a concept: its name, its prompt, an alias, or a text with one in it."""
    return [prompt for prompt in protected if says(prompt, concept.spellings)]


class Likeness:
    """What tells whether prompts say a concept to a model, whatever their texts are; what concepts share is kept."""

    def __init__(self, model: TextModel, protected: Sequence[str]):
        self.model = model
        self.prompts = [text for text in protected if text]
        self._protected = _rows(model, self.prompts) if self.prompts else torch.empty(0)
        self._controls: dict[str, tuple[list[str], torch.Tensor, _Whitening]] = {}  # by kind

    def find(self, concept: Concept) -> list[str]:
        """Return the protected prompts that say a concept to the model, the nearest first."""
        position = last_token(self.model.tokenizers[0], concept.prompt, concept.prompt)
        if position is None or not self.prompts:
            return []
        rows, whitening = self._control_rows(concept)
        own = _rows(self.model, [concept.prompt])[0, position - 1]
        threshold = max(SAME_CONCEPT, whitening.likeness(rows, own).max().item() + _CLEARANCE)
        likeness = whitening.likeness(self._protected, own)
        order = likeness.argsort(descending=True).tolist()
        found = [self.prompts[number] for number in order if likeness[number] > threshold]
        # What an anchor takes out of a name, such as the glasses of 'scientist with glasses', may stay elsewhere.
        return [prompt for prompt in found if not (concept.anchor and says(concept.name, [prompt]))]

    def _control_rows(self, concept: Concept) -> tuple[torch.Tensor, _Whitening]:
        """Return the rows of prompts that do not say the concept, and their whitening."""
        if concept.kind not in self._controls:
            kind = load_template_set(concept.kind)
            texts = [fill(template, kind.neutral) for template in kind.templates] + retain_captions(_NUM_CAPTIONS)
            rows = _rows(self.model, texts)
            self._controls[concept.kind] = texts, rows, _Whitening(rows.flatten(0, 1))
        texts, rows, whitening = self._controls[concept.kind]
        others = [number for number, text in enumerate(texts) if not says(text, concept.spellings)]
        if len(others) < len(texts):
            rows = rows[others]
            whitening = _Whitening(rows.flatten(0, 1))
        return rows, whitening


def check_contradictions(model: TextModel, concepts: Sequence[Concept], protected: Sequence[str]) -> None:
    """Raise ValueError, naming the prompts, where protected ones say a concept that is to be erased."""
    likeness = Likeness(model, protected)
    for concept in concepts:
        found = find_by_text(concept, protected)
        how = "say it"
        if not found:
            found, how = likeness.find(concept), "say it to the model"
        if found:
            shown = ", ".join(f"'{prompt}'" for prompt in found[:_SHOWN])
            more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
            raise ValueError(
                f"{concept.name} cannot be erased and protected at once: the protected prompts {shown}{more} {how}: "
                "leave them out of `protect`"
            )


class _Whitening:
    """The mean of rows (n, d), and what makes all directions of them alike."""

    def __init__(self, rows: torch.Tensor):
        self.mean = rows.mean(0)
        covariance = (rows - self.mean).T @ (rows - self.mean) / len(rows)
        values, self.vectors = torch.linalg.eigh(covariance)
        self.factors = (values.clamp(min=0) + _RIDGE * values.mean()).rsqrt()

    def likeness(self, rows: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
        """Return, for the rows (N, T, d) of prompts, the largest cosine with the row `own` (d,) of a name: (N,)."""
        return F.cosine_similarity(self._whitened(rows), self._whitened(own), dim=-1).amax(1)

    def _whitened(self, rows: torch.Tensor) -> torch.Tensor:
        return (rows - self.mean) @ self.vectors * self.factors


def _rows(model: TextModel, prompts: Sequence[str]) -> torch.Tensor:
    """Return the rows of prompts (N, T - 1, d), float64, without the first, which says nothing of them."""
    batches: list[torch.Tensor] = []
    for _, embeds, _ in encode_in_batches(model, prompts, {}):
        batches.append(model.split(embeds).tokens[:, 1:].cpu().double())
    return torch.cat(batches)
