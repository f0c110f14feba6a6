"""TODO erasure.closed_form."""

from __future__ import annotations

from collections.abc import Mapping
import torch
from ldm.config.concepts import Concept
from ldm.diffusion.model import DiffusionModel
from ldm.erasure.null_space import NullSpaceBasis


MIN_GAIN = 0.03  # least reach of a direction for the root of its cost g: the closed form goes g^2 / (1 + g^2) of the way along it


def erasure_directions(model: DiffusionModel, concept: Concept, tokens: torch.Tensor, given: Mapping,
          basis: NullSpaceBasis) -> tuple[torch.Tensor, torch.Tensor]:
    """`basis.directions` for a concept whose prompts are `tokens` (P, tokens, d), by SRS-ME's settings: the vocabulary's words are
    spared with the weight `spare` for each prompt."""
    spared = torch.zeros(model.width, model.width, dtype=torch.float64)
    if given["spare"]:
        spared = given["spare"] * len(tokens) * model.vocab_gram_without(concept.prompt, concept.name, *concept.aliases)
    return basis.directions(tokens, given["max_base"], given["ridge"], given["keep"], spared)
