"""One class per erasure method, named by its paper: called with noisy latents and timesteps it returns a `LossOutput`.

Each has `parameters()`, what is trained, `to_shift()`, what came of it so far, and `from_config()`, which makes it
for a concept with a model config's settings. The joint one is made of such parts. `ldm.erasure.methods` names them all.
"""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Generator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import reduce
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import nn

from ldm.config.concepts import Concept, watermark_prompts
from ldm.config.methods import ESDConfig, FinetuneConfig, FullCorrelationConfig, SRSMEConfig
from ldm.diffusion.edits import (
    add_layer_outputs,
    attention_score_differences,
    gradient_checkpointing,
    replace_parameters,
)
from ldm.diffusion.model import DiffusionModel
from ldm.diffusion.text_layers import text_layers
from ldm.diffusion.trainable import trainable_parameter_names
from ldm.erasure.layer_rows import in_weight
from ldm.erasure.shift import DenseShift, SeparableShift, WeightShift
from ldm.erasure.targets import target_prompts
from ldm.erasure.training import LossOutput


class SingleConceptLoss(ABC):
    """How a method for one concept predicts: with what it has trained, and without."""

    def __init__(self, model: DiffusionModel, target_embeds: torch.Tensor):
        self.model = model
        self.target_embeds = target_embeds
        self.frozen = model  # that the passes without gradient run on: the same, or a copy on a second device
        self.checkpointing = False  # whether blocks are run again for their gradient, instead of kept

    @classmethod
    @abstractmethod
    def check(cls, model: DiffusionModel, config: Any) -> None:
        """Raise ValueError, saying what to choose instead, for a model that the method cannot change."""

    @abstractmethod
    def parameters(self) -> list[torch.Tensor]:
        """Return what is trained."""

    @abstractmethod
    def to_shift(self) -> WeightShift:
        """Return what has been trained so far as a shift."""

    @abstractmethod
    def __call__(self, latents: torch.Tensor, timestep: torch.Tensor) -> LossOutput:
        """Return the loss for noisy latents (N, C, h, w) at timesteps (N,)."""

    @abstractmethod
    def edited_model(self) -> AbstractContextManager[Any]:
        """While the block runs, let the model predict with what has been trained so far."""

    @contextmanager
    def edited_model_with_grad(self) -> Generator[Any]:
        """While the block runs, let the model predict with what has been trained so far, for a pass with gradient."""
        recompute = (
            gradient_checkpointing(self.model.denoiser, self.edited_model) if self.checkpointing else nullcontext()
        )
        with recompute, self.edited_model() as scope:
            yield scope


class SRSMELoss(SingleConceptLoss):
    """SRS-ME: make the concept's representation uncorrelated with the original one, inside the null space.

    With `r(theta) = eps(z_t, t, c; theta) - eps(z_t, t, ""; theta)` the loss is `mean(r(theta + dW) r(theta)) +
    l1_weight (sum over layers of |dW|_1) / layers` (arXiv 2402.05947). As dW leaves the empty prompt as it is, one
    two-prompt pass of the frozen model and one pass with gradient are enough.

    `target_embeds` (P, tokens, d) are the concept's prompts, used in turn; `uncond_embeds` is (1, tokens, d).
    """

    def __init__(
        self,
        model: DiffusionModel,
        shift: SeparableShift,
        target_embeds: torch.Tensor,
        uncond_embeds: torch.Tensor,
        l1_weight: float,
    ):
        super().__init__(model, target_embeds)
        self.layers = text_layers(model.denoiser)
        self.shift = shift
        self.uncond_embeds = uncond_embeds
        self.l1_weight = l1_weight
        self.directions = (shift.scale * shift.directions).to(model.device, torch.float32)  # (k, d)
        self.prompt_offset = 0
        self.grad_scale = 1.0

    @classmethod
    def check(cls, model: DiffusionModel, config: Any) -> None:
        """Raise ValueError for a denoiser of which no layer sees the prompt alone."""
        text_layers(model.denoiser)

    @classmethod
    def from_config(cls, model: DiffusionModel, concept: Concept, config: SRSMEConfig, shift: SeparableShift) -> Self:
        """Return the loss that trains `shift` further for a concept."""
        target_embeds = model.encode_prompt(list(target_prompts(concept, config, model.tokenizers[0])))
        return cls(model, shift, target_embeds, model.encode_uncond(), config.l1_weight)

    def parameters(self) -> list[torch.Tensor]:
        return self.shift.parameters()

    def to_shift(self) -> SeparableShift:
        return self.shift

    def edited_model(self) -> AbstractContextManager[None]:
        """While the block runs, add to each text layer's output what the shift adds to it."""
        extra = {name: self._layer_delta(name, weight) for name, weight in self.shift.coefficients.items()}
        return add_layer_outputs(self.layers, extra)

    def _layer_delta(self, name: str, weight: torch.Tensor):
        directions = in_weight(self.layers, name, self.directions)  # (k, in)

        def delta(x: torch.Tensor) -> torch.Tensor:
            return ((x.float() @ directions.T) @ self._unscaled(weight).T).to(x.dtype)  # (N, tokens, out)

        return delta

    def _unscaled(self, weight: torch.Tensor) -> torch.Tensor:
        weight = weight.view_as(weight)
        if weight.requires_grad:
            weight.register_hook(lambda gradient: gradient / self.grad_scale)
        return weight

    def __call__(self, latents: torch.Tensor, timestep: torch.Tensor) -> LossOutput:
        prompts = (torch.arange(len(latents)) + self.prompt_offset) % len(self.target_embeds)
        self.prompt_offset += len(latents)
        target_embeds = self.target_embeds[prompts]  # (N, tokens, d)
        with torch.inference_mode():
            pair = _predict_pair(self.frozen, latents, timestep, self.uncond_embeds, target_embeds)
        # For a gradient, inference's own tensors cannot be kept.
        uncond_noise, target_noise = (noise.clone().to(latents.device) for noise in pair)
        with self.edited_model_with_grad():
            edited_noise = self.model.predict_noise(latents, timestep, target_embeds)
        # A mean's gradient, 1/N, is too small for half precision: it is scaled up on its way through the U-Net.
        self.grad_scale = 2.0 ** round(math.log2(latents.numel()))
        edited_noise.register_hook(lambda gradient: gradient * self.grad_scale)
        correlation = ((edited_noise - uncond_noise) * (target_noise - uncond_noise)).mean()
        size = reduce(torch.add, [(weight @ self.directions).abs().sum() for weight in self.parameters()])
        return LossOutput(correlation + self.l1_weight * size / len(self.layers), correlation)


class JointSRSMELoss:
    """SRS-ME-dagger: all concepts' shifts at once, their losses L_i weighted by `eta_i = max_k |L_k| / |L_i|`.

    The weights need every L_i before any gradient is used, yet gradients are linear: that of L_i / |L_i| is taken and
    its graph freed concept by concept, and the sum scaled by max_k |L_k| in the end, so that memory is that of one
    concept. `floor` bounds the weights: an L_i smaller than it counts as `floor`.

    Called with one batch of latents, and of timesteps, per concept; `monitor` is the largest of the concepts' own.
    """

    def __init__(self, losses: Sequence[SRSMELoss], floor: float = 1e-4):
        self.losses, self.floor = list(losses), floor

    def parameters(self) -> list[torch.Tensor]:
        """Return what is trained, concept by concept."""
        parameters: list[torch.Tensor] = []
        for loss in self.losses:
            parameters += loss.parameters()
        return parameters

    def __call__(self, latents: Sequence[torch.Tensor], timestep: Sequence[torch.Tensor]) -> LossOutput:
        """Return the balanced loss for a batch (N, C, h, w) and timesteps (N,) of each concept."""
        gradients: list[torch.Tensor] = []
        sizes, monitors, weighted = [], [], []
        for loss, z, t in zip(self.losses, latents, timestep, strict=True):
            output = loss(z, t)
            size = output.loss.detach().abs().clamp_min(self.floor)
            sizes.append(size)
            gradients += torch.autograd.grad(output.loss / size, loss.parameters())  # and its graph is free again
            monitors.append(output.monitor.detach())
            weighted.append(output.loss.detach() / size)
        largest = torch.stack(sizes).max()
        products = [(weight * gradient).sum() for weight, gradient in zip(self.parameters(), gradients, strict=True)]
        linear = largest * reduce(torch.add, products)
        return LossOutput(largest * reduce(torch.add, weighted) + linear - linear.detach(), torch.stack(monitors).max())


class _FinetuneLoss(SingleConceptLoss):
    """What the methods share that train the U-Net's own weights: a student of them beside the frozen base."""

    def __init__(self, model: DiffusionModel, target_embeds: torch.Tensor, train_method: str):
        super().__init__(model, target_embeds)
        self.student: dict[str, nn.Parameter] = {}
        for name in trainable_parameter_names(model.denoiser, train_method):
            self.student[name] = nn.Parameter(model.denoiser.get_parameter(name).detach().clone())

    @classmethod
    def check(cls, model: DiffusionModel, config: Any) -> None:
        """Raise ValueError for a denoiser in which the train method finds nothing."""
        trainable_parameter_names(model.denoiser, config.train_method)

    def parameters(self) -> list[torch.Tensor]:
        return list(self.student.values())

    def to_shift(self) -> DenseShift:
        return DenseShift.from_weights(self.model.denoiser, self.student)

    def edited_model(self) -> AbstractContextManager[Any]:
        """While the block runs, let the model predict with the student's weights."""
        return replace_parameters(self.model.denoiser, self.student)


class FullCorrelationLoss(_FinetuneLoss):
    """SRS-ME-double-dagger: SRS-ME's loss on all cross-attention weights, for what must never come back.

    `mean(r(theta') r(theta)) + l1_weight (sum over weights of |theta' - theta|_1) / weights` with SRS-ME's r; no null
    space holds the empty prompt, so its prediction changes too. `target_embeds` and `uncond_embeds` are (1, tokens, d).

    What is led away from a concept may be led to a watermark. `repelled` (weight, embeddings (P, tokens, d)) adds
    `weight max(0, <r(theta'), r_p> / <r_p, r_p>) mean(r^2)`, r_p of one of these prompts in turn.
    """

    def __init__(
        self,
        model: DiffusionModel,
        target_embeds: torch.Tensor,
        uncond_embeds: torch.Tensor,
        l1_weight: float,
        train_method: str = "xattn",
        repelled: tuple[float, torch.Tensor] | None = None,
    ):
        super().__init__(model, target_embeds, train_method)
        self.uncond_embeds, self.l1_weight = uncond_embeds, l1_weight
        self.repel_weight, repelled_embeds = repelled or (0.0, target_embeds)
        self._in_turn = itertools.cycle(repelled_embeds.split(1))

    @classmethod
    def from_config(cls, model: DiffusionModel, concept: Concept, config: FullCorrelationConfig) -> Self:
        """Return the loss for a concept."""
        target_embeds, marks = model.encode_prompt([concept.prompt]), list(watermark_prompts())
        repelled = (config.repel_weight, model.encode_prompt(marks)) if config.repel_weight and marks else None
        return cls(model, target_embeds, model.encode_uncond(), config.l1_weight, config.train_method, repelled)

    def __call__(self, latents: torch.Tensor, timestep: torch.Tensor) -> LossOutput:
        with torch.no_grad():
            uncond_noise, target_noise = _predict_pair(
                self.frozen, latents, timestep, self.uncond_embeds, self.target_embeds
            )
        with self.edited_model_with_grad():
            edited_uncond, edited_target = _predict_pair(
                self.model, latents, timestep, self.uncond_embeds, self.target_embeds
            )
        representation, edited = (target_noise - uncond_noise).to(latents.device), edited_target - edited_uncond
        correlation = (edited * representation).mean()
        repulsion = torch.zeros_like(correlation)
        if self.repel_weight:
            mark = next(self._in_turn).expand(len(latents), -1, -1)
            with torch.no_grad():
                other = (self.frozen.predict_noise(latents, timestep, mark) - uncond_noise).to(latents.device)
            towards = (edited * other).mean() / other.square().mean()
            repulsion = self.repel_weight * towards.relu() * representation.square().mean()
        sizes = [
            (weight - self.model.denoiser.get_parameter(name)).abs().sum() for name, weight in self.student.items()
        ]
        size = reduce(torch.add, sizes)
        led_away = correlation + repulsion
        return LossOutput(led_away + self.l1_weight * size / len(self.student), led_away)


class _AnchoredLoss(_FinetuneLoss):
    """What methods share that lead a concept to its anchor; `target_embeds` and `anchor_embeds` are (1, tokens, d)."""

    def __init__(
        self,
        model: DiffusionModel,
        target_embeds: torch.Tensor,
        anchor_embeds: torch.Tensor,
        train_method: str = "xattn",
    ):
        super().__init__(model, target_embeds, train_method)
        self.anchor_embeds = anchor_embeds

    @classmethod
    def check(cls, model: DiffusionModel, config: Any) -> None:
        """Raise ValueError for a denoiser without cross-attention, which the method changes."""
        if not any(".attn2." in name for name, _ in model.denoiser.named_modules()):
            raise ValueError(
                f"{config.name} changes cross-attention, which {type(model.denoiser).__name__} does not have: choose "
                "SRS-ME or ESD"
            )
        super().check(model, config)

    @classmethod
    def from_config(cls, model: DiffusionModel, concept: Concept, config: FinetuneConfig) -> Self:
        """Return the loss for a concept in its first caption, and its category's anchor. Raises as `check`."""
        cls.check(model, config)
        return cls(model, *_caption_and_anchor_embeds(model, concept), config.train_method)


class ForgetMeNotLoss(_AnchoredLoss):
    """FMN, Forget-Me-Not (Zhang et al., arXiv 2303.17591).

    The cross-attention layers' scores under the prompt with the concept become those under the prompt without it: the
    sum over layers of the mean square of `scale q (k(c) - k(a))^T`, the difference of the scores of the same queries.
    Values and outputs change only where they feed a later layer's queries.
    """

    @contextmanager
    def edited_model(self) -> Generator[list[torch.Tensor]]:
        """While the block runs, let each cross-attention layer of the edited model add its difference to the list."""
        model = self.model
        anchor = model.split(self.anchor_embeds.to(model.dtype)).tokens  # (1, tokens, d)
        with super().edited_model():
            inputs = model.adapter.key_inputs(model.denoiser, anchor)
            with attention_score_differences(model.denoiser, inputs) as differences:
                yield differences

    def __call__(self, latents: torch.Tensor, timestep: torch.Tensor) -> LossOutput:
        with self.edited_model_with_grad() as differences:
            self.model.predict_noise(latents, timestep, self.target_embeds.expand(len(latents), -1, -1))
        loss = torch.stack([difference.float().square().mean() for difference in differences]).sum()
        return LossOutput(loss, loss.detach())


class AblatingConceptsLoss(_AnchoredLoss):
    """AbConcept, Ablating Concepts (Kumari et al., arXiv 2303.13516): the concept's noise becomes the anchor's.

    `mse(eps(c; theta'), eps(a; theta)) + 10 mse(eps(a; theta'), eps(a; theta))`.
    """

    ANCHOR_WEIGHT = 10.0  # of the anchor's own drift

    def __call__(self, latents: torch.Tensor, timestep: torch.Tensor) -> LossOutput:
        with torch.no_grad():
            frozen_noise = self.frozen.predict_noise(latents, timestep, self.anchor_embeds.expand(len(latents), -1, -1))
        with self.edited_model_with_grad():
            target_noise, anchor_noise = _predict_pair(
                self.model, latents, timestep, self.target_embeds, self.anchor_embeds
            )
        frozen_noise = frozen_noise.to(latents.device)
        loss = F.mse_loss(target_noise, frozen_noise) + self.ANCHOR_WEIGHT * F.mse_loss(anchor_noise, frozen_noise)
        return LossOutput(loss, loss.detach())


class ESDLoss(_FinetuneLoss):
    """ESD, Erased Stable Diffusion (Gandikota et al., arXiv 2303.07345): the concept's noise turns away from it.

    `mse(eps(c; theta'), eps("") - eta (eps(c) - eps("")))`, the target by the frozen model, eta = `negative_guidance`;
    `target_embeds` and `uncond_embeds` are (1, tokens, d). The student samples its latents (`latents.sampled_batches`).
    """

    def __init__(
        self,
        model: DiffusionModel,
        target_embeds: torch.Tensor,
        uncond_embeds: torch.Tensor,
        negative_guidance: float,
        train_method: str = "xattn",
    ):
        super().__init__(model, target_embeds, train_method)
        self.uncond_embeds, self.negative_guidance = uncond_embeds, negative_guidance

    @classmethod
    def from_config(cls, model: DiffusionModel, concept: Concept, config: ESDConfig) -> Self:
        """Return the loss for a concept in its first caption."""
        target_embeds, _ = _caption_and_anchor_embeds(model, concept)
        return cls(model, target_embeds, model.encode_uncond(), config.negative_guidance, config.train_method)

    def target(self, latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        """Return the noise (N, C, h, w) that the concept's prompt shall predict."""
        with torch.no_grad():
            uncond_noise, target_noise = _predict_pair(
                self.frozen, latents, timestep, self.uncond_embeds, self.target_embeds
            )
        return uncond_noise - self.negative_guidance * (target_noise - uncond_noise)

    def __call__(self, latents: torch.Tensor, timestep: torch.Tensor) -> LossOutput:
        target = self.target(latents, timestep)
        with self.edited_model_with_grad():
            noise = self.model.predict_noise(latents, timestep, self.target_embeds.expand(len(latents), -1, -1))
        loss = F.mse_loss(noise, target.to(noise.device))
        return LossOutput(loss, loss.detach())


def _predict_pair(
    model: DiffusionModel, latents: torch.Tensor, timestep: torch.Tensor, first: torch.Tensor, second: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the noise (N, C, h, w) under each prompt, one (1 or N, tokens, d) for all latents or each, in one pass."""
    pair = torch.cat([prompt.expand(len(latents), -1, -1) for prompt in (first, second)])
    noise = model.predict_noise(torch.cat([latents, latents]), torch.cat([timestep, timestep]), pair)
    uncond, cond = noise.chunk(2)
    return uncond, cond


def _caption_and_anchor_embeds(model: DiffusionModel, concept: Concept) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the embeddings (1, tokens, d) of the concept's first caption and of the same without the concept."""
    return model.encode_prompt([concept.captions[0]]), model.encode_prompt([concept.anchor_prompt])
