"""One class per erasure method: called with noisy latents and their steps it returns `Terms`.

Each has `parameters()`, what is learnt, `shift()`, what has been learnt so far, and `of()`, which makes it for a concept of
`configs/concepts.yaml` with the settings of a model's config; the joint one is made of such parts. `METHODS` at the end
names them all.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from ldm.attention import added, kv_layers, recomputed, score_differences, swapped, trained
from ldm.concepts import Concept, said
from ldm.model import TextToImage
from ldm.null_space import NullSpaceBasis
from ldm.shift import DenseShift, SeparableShift


@dataclass(frozen=True)
class Terms:
    """`total` is what is minimised; `watched` is what decides when to stop."""

    total: torch.Tensor
    watched: torch.Tensor


class Erasure:
    """What a method says about itself: the script that makes its shifts, and what it needs."""

    script: str
    null_space = False  # its shifts live in a basis that SRSME_Solution.py finds
    joint = False  # all concepts' shifts are learnt at once
    pictures = True  # it learns from pictures of the concept; otherwise from what the model draws on the way


class _OneConcept(Erasure, ABC):
    """How a method for one concept predicts: with what it has learnt, and without."""

    def __init__(self, model: TextToImage):
        self.model = model
        self.frozen = model  # that the passes without gradient run on: the same, or a copy on a second device
        self.checkpointing = False  # whether blocks are run again for their gradient, instead of kept

    @abstractmethod
    def active(self) -> AbstractContextManager:
        """While the block runs, the model predicts with what has been learnt so far."""

    @contextmanager
    def trained(self) -> Iterator:
        """Likewise, for a pass with gradient."""
        with recomputed(self.model.unet, self.active) if self.checkpointing else nullcontext(), self.active() as seen:
            yield seen


class SeparableErasure(_OneConcept):
    """SRS-ME: make the concept's representation uncorrelated with the original one, inside the null space.

    With r(theta) = eps(z_t, t, c; theta) - eps(z_t, t, ""; theta) the loss is `mean(r(theta + dW) r(theta)) +
    reg_beta (sum over layers of |dW|_1) / layers` (arXiv 2402.05947). As dW leaves the blank prompt as it is, one
    two-prompt pass of the frozen model and one pass with gradient are enough.

    `concept` (P, tokens, d) are the concept's prompts, used in turn; `blank` is (1, tokens, d).
    """

    script, null_space = "SRS_ME.py", True

    def __init__(self, model: TextToImage, layers: Mapping[str, nn.Linear], learnt: SeparableShift,
                 concept: torch.Tensor, blank: torch.Tensor, reg_beta: float):
        super().__init__(model)
        self.layers, self.learnt = layers, learnt
        self.concept, self.blank, self.reg_beta = concept, blank, reg_beta
        self.directions = (learnt.scale * learnt.directions).to(model.device, torch.float32)  # (k, d)
        self.turn = 0

    @classmethod
    def of(cls, model: TextToImage, concept: Concept, given: Mapping, basis: NullSpaceBasis) -> SeparableErasure:
        embeddings = model.encode_prompt(said(concept, given["templates"]))
        tokens, layers, scale = model.tokens(embeddings), kv_layers(model.unet), given["scale_factor"]
        directions, cost = where(model, concept, tokens, given, basis)
        if given["init"] == "closed-form":
            anchor = model.tokens(model.encode_prompt([concept.anchor if given["anchor"] == "template" else ""]))
            learnt = SeparableShift.closed_form(layers, directions, scale, tokens, anchor, cost)
        else:
            learnt = SeparableShift.zeros(layers, directions, scale)
        return cls(model, layers, learnt, embeddings, model.encode_blank(), given["reg_beta"])

    def parameters(self) -> list[torch.Tensor]:
        return self.learnt.parameters()

    def shift(self) -> SeparableShift:
        return self.learnt

    def active(self) -> AbstractContextManager:
        """While the block runs, each layer puts out too what the shift adds to it."""
        def moved(weight):
            return lambda x: ((x.float() @ self.directions.T) @ self._unscaled(weight).T).to(x.dtype)  # (N, tokens, out)
        return added(self.layers, {name: moved(weight) for name, weight in self.learnt.coefficients.items()})

    def _unscaled(self, weight: torch.Tensor) -> torch.Tensor:
        weight = weight.view_as(weight)
        if weight.requires_grad:
            weight.register_hook(lambda gradient: gradient / self.lifted)
        return weight

    def __call__(self, latents: torch.Tensor, step: torch.Tensor) -> Terms:
        prompts = (torch.arange(len(latents)) + self.turn) % len(self.concept)
        self.turn += len(latents)
        concept = self.concept[prompts]  # (N, tokens, d)
        with torch.inference_mode():
            both = _two(self.frozen, latents, step, self.blank, concept)
        blank_noise, concept_noise = (noise.clone() for noise in both)  # for a gradient, inference's own tensors cannot be kept
        with self.trained():
            shifted_noise = self.model.predict_noise(latents, step, concept)
        # A mean's gradient, 1/N, is too small for half precision: it is lifted on its way through the U-Net.
        self.lifted = 2.0 ** round(math.log2(latents.numel()))
        shifted_noise.register_hook(lambda gradient: gradient * self.lifted)
        blank_noise, concept_noise = blank_noise.to(latents.device), concept_noise.to(latents.device)
        correlation = ((shifted_noise - blank_noise) * (concept_noise - blank_noise)).mean()
        size = sum((weight @ self.directions).abs().sum() for weight in self.learnt.coefficients.values())
        return Terms(correlation + self.reg_beta * size / len(self.layers), correlation)


def where(model: TextToImage, concept: Concept, tokens: torch.Tensor, given: Mapping,
          basis: NullSpaceBasis) -> tuple[torch.Tensor, torch.Tensor]:
    """`basis.directions` for a concept whose prompts are `tokens` (P, tokens, d), by SRS-ME's settings: the vocabulary's words are
    spared with the weight `spare` for each prompt."""
    spared = torch.zeros(model.width, model.width, dtype=torch.float64)
    if given["spare"]:
        spared = given["spare"] * len(tokens) * model.vocabulary_without(concept.prompt, concept.name, *concept.aliases)
    return basis.directions(tokens, given["max_base"], given["ridge"], given["keep"], spared)


class JointErasure(Erasure):
    """SRS-ME-dagger: all concepts' shifts at once, their losses L_i weighted by `eta_i = max_k |L_k| / |L_i|`.

    The weights need every L_i before any gradient is used, yet gradients are linear: that of L_i / |L_i| is taken and its
    graph freed concept by concept, and the sum scaled by max_k |L_k| in the end, so that memory is that of one concept.
    `floor` bounds the weights: an L_i smaller than it counts as `floor`.

    Called with one batch of latents, and of steps, per concept; `watched` is the largest of the concepts' own. Each part
    has its own shift, and `of` makes one.
    """

    script, null_space, joint = "SRS_ME.py --joint", True, True
    of = SeparableErasure.of

    def __init__(self, losses: Sequence[SeparableErasure], floor: float = 1e-4):
        self.losses, self.floor = list(losses), floor

    def parameters(self) -> list[torch.Tensor]:
        return [weight for loss in self.losses for weight in loss.parameters()]

    def __call__(self, latents: Sequence[torch.Tensor], step: Sequence[torch.Tensor]) -> Terms:
        gradients, sizes, watched, value = [], [], [], 0.0
        for loss, z, t in zip(self.losses, latents, step):
            terms = loss(z, t)
            sizes.append(terms.total.detach().abs().clamp_min(self.floor))
            gradients += torch.autograd.grad(terms.total / sizes[-1], loss.parameters())  # and its graph is free again
            watched.append(terms.watched.detach())
            value += terms.total.detach() / sizes[-1]
        largest = torch.stack(sizes).max()
        linear = largest * sum((weight * gradient).sum() for weight, gradient in zip(self.parameters(), gradients))
        return Terms(largest * value + linear - linear.detach(), torch.stack(watched).max())


class _Student(_OneConcept):
    """What the methods that train the U-Net's own weights share: a student of them beside the frozen base."""

    def __init__(self, model: TextToImage, train_method: str):
        super().__init__(model)
        self.student = {name: nn.Parameter(model.unet.get_parameter(name).detach().clone())
                        for name in trained(model.unet, train_method)}

    def parameters(self) -> list[torch.Tensor]:
        return list(self.student.values())

    def shift(self) -> DenseShift:
        return DenseShift.between(self.model.unet, self.student)

    def active(self) -> AbstractContextManager:
        """While the block runs, the model predicts with the student's weights."""
        return swapped(self.model.unet, self.student)


class CorrelationErasure(_Student):
    """SRS-ME-double-dagger: SRS-ME's loss on all cross-attention weights, for what must never come back.

    `mean(r(theta') r(theta)) + reg_beta (sum over weights of |theta' - theta|_1) / weights` with SRS-ME's r; no null
    space holds the blank prompt, so that its prediction moves too. `concept` and `blank` are (1, tokens, d).
    """

    script = "CiE.py"

    def __init__(self, model: TextToImage, concept: torch.Tensor, blank: torch.Tensor, reg_beta: float,
                 train_method: str = "xattn"):
        super().__init__(model, train_method)
        self.concept, self.blank, self.reg_beta = concept, blank, reg_beta

    @classmethod
    def of(cls, model: TextToImage, concept: Concept, given: Mapping, _) -> CorrelationErasure:
        return cls(model, model.encode_prompt([concept.prompt]), model.encode_blank(), given["reg_beta"],
                   given["train_method"])

    def __call__(self, latents: torch.Tensor, step: torch.Tensor) -> Terms:
        with torch.no_grad():
            blank_noise, concept_noise = _two(self.frozen, latents, step, self.blank, self.concept)
        with self.trained():
            moved_blank, moved_concept = _two(self.model, latents, step, self.blank, self.concept)
        correlation = ((moved_concept - moved_blank) * (concept_noise - blank_noise).to(latents.device)).mean()
        size = sum((weight - self.model.unet.get_parameter(name)).abs().sum() for name, weight in self.student.items())
        return Terms(correlation + self.reg_beta * size / len(self.student), correlation)


class _Anchored(_Student):
    """What the methods share that lead a concept to its anchor; `concept` and `anchor` are (1, tokens, d)."""

    def __init__(self, model: TextToImage, concept: torch.Tensor, anchor: torch.Tensor, train_method: str = "xattn"):
        super().__init__(model, train_method)
        self.concept, self.anchor = concept, anchor

    @classmethod
    def of(cls, model: TextToImage, concept: Concept, given: Mapping, _) -> _Anchored:
        return cls(model, *_in_context(model, concept), given["train_method"])


class AttentionErasure(_Anchored):
    """FMN, Forget-Me-Not (Zhang et al., arXiv 2303.17591): the cross-attention layers' scores under the prompt with the
    concept become those under the prompt without it.

    The sum over layers of the mean square of `scale q (k(c) - k(a))^T`, the difference of the scores of the same queries.
    Values and outputs move only where they feed a later layer's queries. `concept` and `anchor` are (1, tokens, d).
    """

    script = "FMN.py"

    @contextmanager
    def active(self) -> Iterator[list[torch.Tensor]]:
        """Likewise, and each cross-attention layer puts what differs into the list."""
        with super().active(), score_differences(self.model.unet, self.anchor) as differences:
            yield differences

    def __call__(self, latents: torch.Tensor, step: torch.Tensor) -> Terms:
        with self.trained() as differences:
            self.model.predict_noise(latents, step, self.concept.expand(len(latents), -1, -1))
        total = torch.stack([difference.float().square().mean() for difference in differences]).sum()
        return Terms(total, total.detach())


class AnchorErasure(_Anchored):
    """AbConcept, Ablating Concepts (Kumari et al., arXiv 2303.13516): the concept's noise becomes the anchor's.

    `mse(eps(c; theta'), eps(a; theta)) + 10 mse(eps(a; theta'), eps(a; theta))`; `concept` and `anchor` (1, tokens, d).
    """

    script = "Abconcept.py"
    KEEP = 10.0  # the weight of the anchor's own drift

    def __call__(self, latents: torch.Tensor, step: torch.Tensor) -> Terms:
        with torch.no_grad():
            target = self.frozen.predict_noise(latents, step, self.anchor.expand(len(latents), -1, -1))
        with self.trained():
            concept_noise, anchor_noise = _two(self.model, latents, step, self.concept, self.anchor)
        target = target.to(latents.device)
        total = F.mse_loss(concept_noise, target) + self.KEEP * F.mse_loss(anchor_noise, target)
        return Terms(total, total.detach())


class NegativeGuidance(_Student):
    """ESD, Erased Stable Diffusion (Gandikota et al., arXiv 2303.07345): the concept's noise turns away from the concept.

    `mse(eps(c; theta'), eps("") - eta (eps(c) - eps("")))`, the target by the frozen model, eta = `negative_guidance`;
    `concept` and `blank` are (1, tokens, d). Its latents are drawn by the student itself (`ldm.latents.sampled`).
    """

    script, pictures = "Esd.py", False

    def __init__(self, model: TextToImage, concept: torch.Tensor, blank: torch.Tensor, negative_guidance: float,
                 train_method: str = "xattn"):
        super().__init__(model, train_method)
        self.concept, self.blank, self.negative_guidance = concept, blank, negative_guidance

    @classmethod
    def of(cls, model: TextToImage, concept: Concept, given: Mapping, _) -> NegativeGuidance:
        return cls(model, _in_context(model, concept)[0], model.encode_blank(), given["negative_guidance"],
                   given["train_method"])

    def target(self, latents: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
        """The noise (N, C, h, w) that the concept's prompt shall predict."""
        with torch.no_grad():
            blank_noise, concept_noise = _two(self.frozen, latents, step, self.blank, self.concept)
        return blank_noise - self.negative_guidance * (concept_noise - blank_noise)

    def __call__(self, latents: torch.Tensor, step: torch.Tensor) -> Terms:
        target = self.target(latents, step)
        with self.trained():
            noise = self.model.predict_noise(latents, step, self.concept.expand(len(latents), -1, -1))
        total = F.mse_loss(noise, target.to(noise.device))
        return Terms(total, total.detach())


def _two(model: TextToImage, latents: torch.Tensor, step: torch.Tensor, first: torch.Tensor,
         second: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The noise (N, C, h, w) under each of two prompts, one (1 or N, tokens, d) for all latents or for each, in one pass."""
    both = torch.cat([prompt.expand(len(latents), -1, -1) for prompt in (first, second)])
    return model.predict_noise(torch.cat([latents, latents]), torch.cat([step, step]), both).chunk(2)


def _in_context(model: TextToImage, concept: Concept) -> tuple[torch.Tensor, torch.Tensor]:
    """The embeddings (1, tokens, d) of the concept's first caption and of the same without the concept."""
    return model.encode_prompt([concept.captions[0]]), model.encode_prompt([concept.anchor])


METHODS: dict[str, type[Erasure]] = {
    "SRS-ME": SeparableErasure, "SRS-ME-dagger": JointErasure, "SRS-ME-double-dagger": CorrelationErasure,
    "FMN": AttentionErasure, "AbConcept": AnchorErasure, "ESD": NegativeGuidance}
