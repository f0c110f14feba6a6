"""TODO erasure.losses."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
import math
import torch
from torch import nn
import torch.nn.functional as F
from ldm.config.concepts import Concept, said
from ldm.diffusion.edits import add_layer_outputs, attention_score_differences, gradient_checkpointing, replace_parameters
from ldm.diffusion.model import DiffusionModel
from ldm.diffusion.text_layers import text_layers
from ldm.diffusion.trainable import trainable_parameter_names
from ldm.erasure.closed_form import erasure_directions
from ldm.erasure.null_space import NullSpaceBasis
from ldm.erasure.shift import DenseShift, SeparableShift


@dataclass(frozen=True)
class LossOutput:
    """`total` is what is minimised; `watched` is what decides when to stop."""

    total: torch.Tensor
    watched: torch.Tensor


class ErasureMethod:
    """What a method says about itself: the script that makes its shifts, and what it needs."""

    script: str
    null_space = False  # its shifts live in a basis that SRSME_Solution.py finds
    joint = False  # all concepts' shifts are learnt at once
    pictures = True  # it learns from pictures of the concept; otherwise from what the model draws on the way


class _SingleConceptLoss(ErasureMethod, ABC):
    """How a method for one concept predicts: with what it has learnt, and without."""

    def __init__(self, model: DiffusionModel):
        self.model = model
        self.frozen = model  # that the passes without gradient run on: the same, or a copy on a second device
        self.checkpointing = False  # whether blocks are run again for their gradient, instead of kept

    @abstractmethod
    def active(self) -> AbstractContextManager:
        """While the block runs, the model predicts with what has been learnt so far."""

    @contextmanager
    def trainable_parameter_names(self) -> Iterator:
        """Likewise, for a pass with gradient."""
        with gradient_checkpointing(self.model.unet, self.active) if self.checkpointing else nullcontext(), self.active() as seen:
            yield seen


class SRSMELoss(_SingleConceptLoss):
    """SRS-ME: make the concept's representation uncorrelated with the original one, inside the null space.

    With r(theta) = eps(z_t, t, c; theta) - eps(z_t, t, ""; theta) the loss is `mean(r(theta + dW) r(theta)) +
    reg_beta (sum over layers of |dW|_1) / layers` (arXiv 2402.05947). As dW leaves the blank prompt as it is, one
    two-prompt pass of the frozen model and one pass with gradient are enough.

    `concept` (P, tokens, d) are the concept's prompts, used in turn; `blank` is (1, tokens, d).
    """

    script, null_space = "SRS_ME.py", True

    def __init__(self, model: DiffusionModel, layers: Mapping[str, nn.Linear], learnt: SeparableShift,
                 concept: torch.Tensor, blank: torch.Tensor, reg_beta: float):
        super().__init__(model)
        self.layers, self.shift = layers, learnt
        self.concept, self.blank, self.reg_beta = concept, blank, reg_beta
        self.directions = (learnt.scale * learnt.directions).to(model.device, torch.float32)  # (k, d)
        self.prompt_offset = 0

    @classmethod
    def of(cls, model: DiffusionModel, concept: Concept, given: Mapping, basis: NullSpaceBasis) -> SRSMELoss:
        embeddings = model.encode_prompt(said(concept, given["templates"]))
        tokens, layers, scale = model.tokens(embeddings), text_layers(model.unet), given["scale_factor"]
        directions, cost = erasure_directions(model, concept, tokens, given, basis)
        if given["init"] == "closed-form":
            anchor = model.tokens(model.encode_prompt([concept.anchor if given["anchor"] == "template" else ""]))
            learnt = SeparableShift.closed_form(layers, directions, scale, tokens, anchor, cost)
        else:
            learnt = SeparableShift.zeros(layers, directions, scale)
        return cls(model, layers, learnt, embeddings, model.encode_uncond(), given["reg_beta"])

    def parameters(self) -> list[torch.Tensor]:
        return self.shift.parameters()

    def shift(self) -> SeparableShift:
        return self.shift

    def active(self) -> AbstractContextManager:
        """While the block runs, each layer puts out too what the shift adds to it."""
        def moved(weight):
            return lambda x: ((x.float() @ self.directions.T) @ self._unscaled(weight).T).to(x.dtype)  # (N, tokens, out)
        return add_layer_outputs(self.layers, {name: moved(weight) for name, weight in self.shift.coefficients.items()})

    def _unscaled(self, weight: torch.Tensor) -> torch.Tensor:
        weight = weight.view_as(weight)
        if weight.requires_grad:
            weight.register_hook(lambda gradient: gradient / self.grad_scale)
        return weight

    def __call__(self, latents: torch.Tensor, step: torch.Tensor) -> LossOutput:
        prompts = (torch.arange(len(latents)) + self.prompt_offset) % len(self.concept)
        self.prompt_offset += len(latents)
        concept = self.concept[prompts]  # (N, tokens, d)
        with torch.inference_mode():
            both = _predict_pair(self.frozen, latents, step, self.blank, concept)
        blank_noise, concept_noise = (noise.clone() for noise in both)  # for a gradient, inference's own tensors cannot be kept
        with self.trained():
            shifted_noise = self.model.predict_noise(latents, step, concept)
        # A mean's gradient, 1/N, is too small for half precision: it is lifted on its way through the U-Net.
        self.grad_scale = 2.0 ** round(math.log2(latents.numel()))
        shifted_noise.register_hook(lambda gradient: gradient * self.grad_scale)
        blank_noise, concept_noise = blank_noise.to(latents.device), concept_noise.to(latents.device)
        correlation = ((shifted_noise - blank_noise) * (concept_noise - blank_noise)).mean()
        size = sum((weight @ self.directions).abs().sum() for weight in self.shift.coefficients.values())
        return LossOutput(correlation + self.reg_beta * size / len(self.layers), correlation)


class JointSRSMELoss(ErasureMethod):
    """SRS-ME-dagger: all concepts' shifts at once, their losses L_i weighted by `eta_i = max_k |L_k| / |L_i|`.

    The weights need every L_i before any gradient is used, yet gradients are linear: that of L_i / |L_i| is taken and its
    graph freed concept by concept, and the sum scaled by max_k |L_k| in the end, so that memory is that of one concept.
    `floor` bounds the weights: an L_i smaller than it counts as `floor`.

    Called with one batch of latents, and of steps, per concept; `watched` is the largest of the concepts' own. Each part
    has its own shift, and `of` makes one.
    """

    script, null_space, joint = "SRS_ME.py --joint", True, True
    of = SRSMELoss.of

    def __init__(self, losses: Sequence[SRSMELoss], floor: float = 1e-4):
        self.losses, self.floor = list(losses), floor

    def parameters(self) -> list[torch.Tensor]:
        return [weight for loss in self.losses for weight in loss.parameters()]

    def __call__(self, latents: Sequence[torch.Tensor], step: Sequence[torch.Tensor]) -> LossOutput:
        gradients, sizes, watched, value = [], [], [], 0.0
        for loss, z, t in zip(self.losses, latents, step):
            terms = loss(z, t)
            sizes.append(terms.total.detach().abs().clamp_min(self.floor))
            gradients += torch.autograd.grad(terms.total / sizes[-1], loss.parameters())  # and its graph is free again
            watched.append(terms.monitor.detach())
            value += terms.total.detach() / sizes[-1]
        largest = torch.stack(sizes).max()
        linear = largest * sum((weight * gradient).sum() for weight, gradient in zip(self.parameters(), gradients))
        return LossOutput(largest * value + linear - linear.detach(), torch.stack(watched).max())


class _FinetuneLoss(_SingleConceptLoss):
    """What the methods that train the U-Net's own weights share: a student of them beside the frozen base."""

    def __init__(self, model: DiffusionModel, train_method: str):
        super().__init__(model)
        self.student = {name: nn.Parameter(model.unet.get_parameter(name).detach().clone())
                        for name in trainable_parameter_names(model.unet, train_method)}

    def parameters(self) -> list[torch.Tensor]:
        return list(self.student.values())

    def shift(self) -> DenseShift:
        return DenseShift.from_weights(self.model.unet, self.student)

    def active(self) -> AbstractContextManager:
        """While the block runs, the model predicts with the student's weights."""
        return replace_parameters(self.model.unet, self.student)


class FullCorrelationLoss(_FinetuneLoss):
    """SRS-ME-double-dagger: SRS-ME's loss on all cross-attention weights, for what must never come back.

    `mean(r(theta') r(theta)) + reg_beta (sum over weights of |theta' - theta|_1) / weights` with SRS-ME's r; no null
    space holds the blank prompt, so that its prediction moves too. `concept` and `blank` are (1, tokens, d).
    """

    script = "CiE.py"

    def __init__(self, model: DiffusionModel, concept: torch.Tensor, blank: torch.Tensor, reg_beta: float,
                 train_method: str = "xattn"):
        super().__init__(model, train_method)
        self.concept, self.blank, self.reg_beta = concept, blank, reg_beta

    @classmethod
    def of(cls, model: DiffusionModel, concept: Concept, given: Mapping, _) -> FullCorrelationLoss:
        return cls(model, model.encode_prompt([concept.prompt]), model.encode_uncond(), given["reg_beta"],
                   given["train_method"])

    def __call__(self, latents: torch.Tensor, step: torch.Tensor) -> LossOutput:
        with torch.no_grad():
            blank_noise, concept_noise = _predict_pair(self.frozen, latents, step, self.blank, self.concept)
        with self.trained():
            moved_blank, moved_concept = _predict_pair(self.model, latents, step, self.blank, self.concept)
        correlation = ((moved_concept - moved_blank) * (concept_noise - blank_noise).to(latents.device)).mean()
        size = sum((weight - self.model.unet.get_parameter(name)).abs().sum() for name, weight in self.student.items())
        return LossOutput(correlation + self.reg_beta * size / len(self.student), correlation)


class _AnchoredLoss(_FinetuneLoss):
    """What the methods share that lead a concept to its anchor; `concept` and `anchor` are (1, tokens, d)."""

    def __init__(self, model: DiffusionModel, concept: torch.Tensor, anchor: torch.Tensor, train_method: str = "xattn"):
        super().__init__(model, train_method)
        self.concept, self.anchor = concept, anchor

    @classmethod
    def of(cls, model: DiffusionModel, concept: Concept, given: Mapping, _) -> _AnchoredLoss:
        return cls(model, *_caption_and_anchor_embeds(model, concept), given["train_method"])


class ForgetMeNotLoss(_AnchoredLoss):
    """FMN, Forget-Me-Not (Zhang et al., arXiv 2303.17591): the cross-attention layers' scores under the prompt with the
    concept become those under the prompt without it.

    The sum over layers of the mean square of `scale q (k(c) - k(a))^T`, the difference of the scores of the same queries.
    Values and outputs move only where they feed a later layer's queries. `concept` and `anchor` are (1, tokens, d).
    """

    script = "FMN.py"

    @contextmanager
    def active(self) -> Iterator[list[torch.Tensor]]:
        """Likewise, and each cross-attention layer puts what differs into the list."""
        with super().active(), attention_score_differences(self.model.unet, self.anchor) as differences:
            yield differences

    def __call__(self, latents: torch.Tensor, step: torch.Tensor) -> LossOutput:
        with self.trained() as differences:
            self.model.predict_noise(latents, step, self.concept.expand(len(latents), -1, -1))
        total = torch.stack([difference.float().square().mean() for difference in differences]).sum()
        return LossOutput(total, total.detach())


class AblatingConceptsLoss(_AnchoredLoss):
    """AbConcept, Ablating Concepts (Kumari et al., arXiv 2303.13516): the concept's noise becomes the anchor's.

    `mse(eps(c; theta'), eps(a; theta)) + 10 mse(eps(a; theta'), eps(a; theta))`; `concept` and `anchor` (1, tokens, d).
    """

    script = "Abconcept.py"
    KEEP = 10.0  # the weight of the anchor's own drift

    def __call__(self, latents: torch.Tensor, step: torch.Tensor) -> LossOutput:
        with torch.no_grad():
            target = self.frozen.predict_noise(latents, step, self.anchor.expand(len(latents), -1, -1))
        with self.trained():
            concept_noise, anchor_noise = _predict_pair(self.model, latents, step, self.concept, self.anchor)
        target = target.to(latents.device)
        total = F.mse_loss(concept_noise, target) + self.KEEP * F.mse_loss(anchor_noise, target)
        return LossOutput(total, total.detach())


class ESDLoss(_FinetuneLoss):
    """ESD, Erased Stable Diffusion (Gandikota et al., arXiv 2303.07345): the concept's noise turns away from the concept.

    `mse(eps(c; theta'), eps("") - eta (eps(c) - eps("")))`, the target by the frozen model, eta = `negative_guidance`;
    `concept` and `blank` are (1, tokens, d). Its latents are drawn by the student itself (`ldm.latents.sampled`).
    """

    script, pictures = "Esd.py", False

    def __init__(self, model: DiffusionModel, concept: torch.Tensor, blank: torch.Tensor, negative_guidance: float,
                 train_method: str = "xattn"):
        super().__init__(model, train_method)
        self.concept, self.blank, self.negative_guidance = concept, blank, negative_guidance

    @classmethod
    def of(cls, model: DiffusionModel, concept: Concept, given: Mapping, _) -> ESDLoss:
        return cls(model, _caption_and_anchor_embeds(model, concept)[0], model.encode_uncond(), given["negative_guidance"],
                   given["train_method"])

    def target(self, latents: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
        """The noise (N, C, h, w) that the concept's prompt shall predict."""
        with torch.no_grad():
            blank_noise, concept_noise = _predict_pair(self.frozen, latents, step, self.blank, self.concept)
        return blank_noise - self.negative_guidance * (concept_noise - blank_noise)

    def __call__(self, latents: torch.Tensor, step: torch.Tensor) -> LossOutput:
        target = self.target(latents, step)
        with self.trained():
            noise = self.model.predict_noise(latents, step, self.concept.expand(len(latents), -1, -1))
        total = F.mse_loss(noise, target.to(noise.device))
        return LossOutput(total, total.detach())


def _predict_pair(model: DiffusionModel, latents: torch.Tensor, step: torch.Tensor, first: torch.Tensor,
         second: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The noise (N, C, h, w) under each of two prompts, one (1 or N, tokens, d) for all latents or for each, in one pass."""
    both = torch.cat([prompt.expand(len(latents), -1, -1) for prompt in (first, second)])
    return model.predict_noise(torch.cat([latents, latents]), torch.cat([step, step]), both).chunk(2)


def _caption_and_anchor_embeds(model: DiffusionModel, concept: Concept) -> tuple[torch.Tensor, torch.Tensor]:
    """The embeddings (1, tokens, d) of the concept's first caption and of the same without the concept."""
    return model.encode_prompt([concept.captions[0]]), model.encode_prompt([concept.anchor])
