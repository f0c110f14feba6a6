"""One class per erasure method; each is called with noisy latents and their steps and returns `Terms`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from ldm.attention import added
from ldm.model import TextToImage
from ldm.shift import WeightShift


@dataclass(frozen=True)
class Terms:
    """`total` is what is minimised; `watched` is what decides when to stop."""

    total: torch.Tensor
    watched: torch.Tensor


class SeparableErasure:
    """SRS-ME: make the concept's representation uncorrelated with the original one, inside the null space.

    With r(theta) = eps(z_t, t, c; theta) - eps(z_t, t, ""; theta) the loss is `mean(r(theta + dW) r(theta)) +
    reg_beta (sum over layers of |dW|_1) / layers` (arXiv 2402.05947). As dW leaves the blank prompt as it is, one
    two-prompt pass of the frozen model and one pass with gradient are enough.

    `concept` (P, tokens, d) are the concept's prompts, used in turn; `blank` is (1, tokens, d).
    """

    def __init__(self, model: TextToImage, layers: Mapping[str, nn.Linear], shift: WeightShift,
                 concept: torch.Tensor, blank: torch.Tensor, reg_beta: float):
        self.model, self.layers, self.shift = model, layers, shift
        self.concept, self.blank, self.reg_beta = concept, blank, reg_beta
        self.directions = (shift.scale * shift.directions).to(model.device, torch.float32)  # (k, d)
        self.turn = 0

    def extra(self) -> dict:
        """What the shift, as learnt so far, adds to each layer's output: functions of its input, for `added`."""
        def moved(weight):
            return lambda x: ((x.float() @ self.directions.T) @ weight.T).to(x.dtype)  # (N, tokens, out)
        return {name: moved(weight) for name, weight in self.shift.coefficients.items()}

    def __call__(self, latents: torch.Tensor, step: torch.Tensor) -> Terms:
        prompts = (torch.arange(len(latents)) + self.turn) % len(self.concept)
        self.turn += len(latents)
        concept = self.concept[prompts]  # (N, tokens, d)
        with torch.no_grad():
            both = torch.cat([self.blank.expand_as(concept), concept])
            blank_noise, concept_noise = self.model.predict_noise(
                torch.cat([latents, latents]), torch.cat([step, step]), both).chunk(2)
        with added(self.layers, self.extra()):
            shifted_noise = self.model.predict_noise(latents, step, concept)
        correlation = ((shifted_noise - blank_noise).float() * (concept_noise - blank_noise).float()).mean()
        size = sum((weight @ self.directions).abs().sum() for weight in self.shift.coefficients.values())
        return Terms(correlation + self.reg_beta * size / len(self.layers), correlation)
