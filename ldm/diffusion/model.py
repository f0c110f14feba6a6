"""A frozen text-to-image model: embed prompts, encode and decode images, predict the noise."""

from __future__ import annotations

import hashlib
import json
from copy import copy, deepcopy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from ldm.diffusion.families import FAMILIES, family_of
from ldm.diffusion.family import AFTER_NORM, Family
from ldm.diffusion.text_layers import TextLayers, text_layers
from ldm.diffusion.text_model import TextModel, canonical_name, join_streams, own_config
from ldm.diffusion.tokenizer import tokenizer_digest
from ldm.diffusion.weights import file_states
from ldm.io.tensors import check_finite, tensor_digest

_MAX_PIXELS = 512 * 512  # that the autoencoder takes in one pass: its memory grows with them


def common_dtype(module: torch.nn.Module) -> torch.dtype:
    """Return the dtype of a part's weights, or float32 where they are of several."""
    dtypes = {weight.dtype for weight in module.parameters()}
    return dtypes.pop() if len(dtypes) == 1 else torch.float32


@dataclass
class DiffusionModel(TextModel):
    """The frozen parts of a text-to-image model, of any family that has an adapter, on one device.

    The denoiser is held in `dtype`, all else in float32. The text encoders and the autoencoder come to the device when
    needed, and leave it by `offload`. `scheduler` is a template, from which `sampling.make_scheduler` makes one.
    """

    checkpoint: Path | None = None  # the single file that it was loaded from

    def __post_init__(self) -> None:
        super().__post_init__()
        # Any: diffusers declares the entries of its configs nowhere, and torch.compile replaces the denoiser
        self.denoiser: Any = getattr(self.pipeline, self.adapter.denoiser)
        self.vae: Any = self.pipeline.vae
        self.text_encoder: Any = next(iter(self._text_encoders.values()))
        self.scheduler: Any = self.pipeline.scheduler
        self.is_rounded = False  # by `to`
        for module in (self.denoiser, self.vae):
            module.requires_grad_(False).eval()
        _ = self.digest, self.text_digest  # of the weights before they are rounded
        self.read_dtype = common_dtype(self.denoiser)
        self.denoiser.to(self.device, self.dtype)
        for module in (self.denoiser, self.vae):  # made of convolutions
            module.to(memory_format=torch.channels_last)
        if not self.adapter.is_flow:
            self._alphas_cumprod: torch.Tensor = self.scheduler.alphas_cumprod.to(self.device)  # (num_train_timesteps,)

    @property
    def adapter(self) -> Family:
        denoiser = getattr(self, "denoiser", None)
        return family_of(denoiser) if denoiser is not None and self.family not in FAMILIES else super().adapter

    @property
    def image_size(self) -> int:
        """Return the side of an image in pixels."""
        return self.adapter.image_size(self.pipeline)

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Return the shape of one image's latents as the denoiser takes them: (C, h, w), or (s, C) of s packed."""
        return self.adapter.latent_shape(self.pipeline, self.image_size)

    @property
    def text_layers(self) -> TextLayers:
        """Return the linear layers of the denoiser that see the prompt alone, by name."""
        return text_layers(self.denoiser)

    @cached_property
    def _norm(self) -> str:
        """The name of the norm before the text layers; empty where there is none."""
        return next((layer.norm for layer in self.text_layers.found.values()), "")

    @property
    def kind(self) -> str:
        return f"{super().kind}{AFTER_NORM}{self._norm_digest}" if self._norm else super().kind

    @cached_property
    def _norm_digest(self) -> str:
        """The digest of the norm before the text layers, the same of a model that is held in bfloat16."""
        weights = dict(self.denoiser.get_submodule(self._norm).named_parameters())
        return tensor_digest({name: weight.bfloat16() for name, weight in weights.items()})[:16]

    def layer_inputs(self, rows: torch.Tensor) -> torch.Tensor:
        """Return what text layers see of prompts' rows (N, T, d): the same, but where a norm is before them."""
        if not self._norm:
            return rows
        module = self.denoiser.get_submodule(self._norm)
        with torch.no_grad():
            normed = module(rows.to(next(module.parameters()))).float()
        return normed * rows.any(dim=-1, keepdim=True).to(normed)  # so that no row becomes one

    @property
    def num_train_timesteps(self) -> int:
        """Return the number of diffusion timesteps of training."""
        return self.scheduler.config.num_train_timesteps

    @property
    def digest(self) -> str:
        """Return the digest of the base model: tokenizers, text encoders and U-Net as loaded, before any merge."""
        return self.digests[0]

    @property
    def digests(self) -> tuple[str, ...]:
        """Return `digest`, and what it was in version 1, which left the tokenizers out and counted buffers."""
        return self._digests

    @cached_property
    def _digests(self) -> tuple[str, ...]:
        parameters: dict[str, torch.Tensor] = {}
        buffers: dict[str, torch.Tensor] = {}
        own_name = self.adapter.denoiser
        for module_name, module in {**self._text_encoders, own_name: self.denoiser}.items():
            own = {name for name, _ in module.named_buffers()}
            for name, value in module.state_dict().items():
                known = name if module_name == own_name else canonical_name(name)
                if value.is_floating_point():
                    (buffers if name in own else parameters)[f"{module_name}.{known}"] = value
        weights = tensor_digest(parameters)
        version_1 = tensor_digest(parameters | buffers) if buffers else weights
        tokenizers = [tokenizer_digest(tokenizer) for tokenizer in self._plain_tokenizers.values()]
        configs = [own_config(module) for module in (*self._text_encoders.values(), self.denoiser)]
        whole = json.dumps([weights, *tokenizers, *configs], sort_keys=True)
        return f"2:{hashlib.sha256(whole.encode()).hexdigest()}", version_1

    @cached_property
    def generation_metadata(self) -> dict[str, Any]:
        """Return what decides this model's images beside prompt, seed and sampling settings; before any merge."""
        scheduler_config = {name: value for name, value in self.scheduler.config.items() if not name.startswith("_")}
        metadata = {
            "model_digest": self.digest,
            "decoder_digest": tensor_digest(self.vae.state_dict()),
            "decoder_config": own_config(self.vae),
            "image_size": self.image_size,
            "scheduler": type(self.scheduler).__name__,
            "scheduler_config": scheduler_config,
        }
        if self.dtype != torch.float32:
            metadata["dtype"] = str(self.dtype)
        return metadata

    def check_files(self) -> None:
        """Raise ValueError where a file that the denoiser is mapped from is not what it was: its weights may not be."""
        states: dict[Path, Any] = getattr(self.denoiser, "mapped_from", {})
        is_mapped = self.dtype == self.read_dtype and self.device.type == torch.get_default_device().type
        if is_mapped and states != file_states(states):
            raise ValueError(f"the files of {self.name} were changed since it was loaded: load it again")

    def offload(self) -> None:
        """Move text encoders and autoencoder to the CPU, until they are needed again."""
        for module in (*self._text_encoders.values(), self.vae):
            module.cpu()

    def replicate_denoiser(self, device: torch.device) -> DiffusionModel:
        """Return the model with a copy of its denoiser on another device, for passes that run beside this one's."""
        replica = copy(self)
        replica.device, replica.denoiser = device, deepcopy(self.denoiser).to(device)
        if not self.adapter.is_flow:
            replica._alphas_cumprod = self._alphas_cumprod.to(device)
        return replica

    def check_fits(self, dtype: torch.dtype) -> None:
        """Raise ValueError where a weight overflows in `dtype`."""
        for module in (*self._text_encoders.values(), self.denoiser, self.vae):
            for name, weight in module.named_parameters():
                check_finite({name: weight.to(dtype)}, f"{self.name} in {dtype}")

    def to(self, dtype: torch.dtype) -> None:
        """Round all weights to `dtype`, which they fit, for a model that is only to be saved."""
        self.pipeline.to(dtype=dtype)
        self.is_rounded = dtype != torch.float32

    def encode_uncond(self) -> torch.Tensor:
        """Embed the unconditional prompt, (1, rows, d): the empty one; for XL zeros, if its pipeline says so."""
        uncond_embeds = self.encode_prompt([""])
        with torch.no_grad():
            own = self.adapter.encode_negative(self.pipeline, [""], self.device)
        if own is not None:
            return join_streams(own.tokens.float(), own.pooled)
        if self.pipeline.config.get("force_zeros_for_empty_prompt"):
            return torch.zeros_like(uncond_embeds)
        return uncond_embeds

    @torch.no_grad()
    def encode_image(self, images: torch.Tensor) -> torch.Tensor:
        """Encode images (N, 3, H, W) in [-1, 1] as scaled latents (N, ...), the means of the posterior."""
        self.vae.to(self.device)
        batches = (batch.to(self.device, self.vae.dtype) for batch in images.split(self._vae_batch_size()))
        return torch.cat([self.adapter.encode_image(self.pipeline, batch) for batch in batches])

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Decode scaled latents (N, ...) to images (N, 3, H, W), about in [-1, 1]."""
        self.vae.to(self.device)
        batches = (batch.to(self.vae.dtype) for batch in latents.split(self._vae_batch_size()))
        return torch.cat([self.adapter.decode(self.pipeline, batch) for batch in batches])

    def _vae_batch_size(self) -> int:
        return max(1, _MAX_PIXELS // self.image_size**2)

    def _alpha_bar(self, timestep: torch.Tensor) -> torch.Tensor:
        """Return a_t, the cumulative product of alphas at `timestep` (N,) or (), as (N, 1, 1, 1)."""
        index = timestep.round().long() if timestep.is_floating_point() else timestep
        return self._alphas_cumprod[index].view(-1, 1, 1, 1)

    def add_noise(self, latents: torch.Tensor, noise: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        """Return noised latents (N, ...): of a diffusion `sqrt(a_t) z + sqrt(1 - a_t) noise`, of a flow a mean of both.

        a_t is the cumulative product of alphas; a flow has `t / T` parts of noise, T the number of timesteps. `latents`
        and `noise` are (N, ...), `timestep` is (N,).
        """
        if self.adapter.is_flow:
            sigma = (timestep / self.num_train_timesteps).to(latents).view(-1, *[1] * (latents.dim() - 1))
            return (1 - sigma) * latents + sigma * noise
        alpha_bar = self._alpha_bar(timestep).to(latents.dtype)
        return alpha_bar.sqrt() * latents + (1 - alpha_bar).sqrt() * noise

    def training_target(self, latents: torch.Tensor, noise: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        """Return what `denoiser_output` is trained to be where `noise` was added to clean `latents`, (N, ...) each.

        It is the noise, or its velocity: `sqrt(a_t) noise - sqrt(1 - a_t) z` of a diffusion, `noise - z` of a flow.
        """
        if self.adapter.is_flow:
            return noise - latents
        if self.scheduler.config.get("prediction_type", "epsilon") == "epsilon":
            return noise
        alpha_bar = self._alpha_bar(timestep).to(latents.dtype)
        return alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * latents

    def denoiser_output(
        self, latents: torch.Tensor, timestep: torch.Tensor, prompt_embeds: torch.Tensor
    ) -> torch.Tensor:
        """Return what the denoiser predicts, noise or velocity, (N, ...) in float32.

        `latents` are (N, ...), `timestep` is () or (N,), `prompt_embeds` are (N, T + 1, d + p), or (N, T, d).
        """
        split = self.split(prompt_embeds.to(self.device, self.dtype))
        inputs = latents.to(self.device, self.dtype), timestep.to(self.device), split
        return self.adapter.predict(self.denoiser, *inputs, self.image_size).float()

    def predict_noise(self, latents: torch.Tensor, timestep: torch.Tensor, prompt_embeds: torch.Tensor) -> torch.Tensor:
        """Return what erasures are learnt by, (N, ...) in float32; the arguments are those of `denoiser_output`.

        Of a diffusion it is the noise eps(z_t, t, e): of a velocity v `sqrt(a_t) v + sqrt(1 - a_t) z_t` (Salimans and
        Ho, arXiv 2202.00512). Of a flow it is the velocity.
        """
        output = self.denoiser_output(latents, timestep, prompt_embeds)
        if self.adapter.is_flow or self.scheduler.config.get("prediction_type", "epsilon") == "epsilon":
            return output
        alpha_bar = self._alpha_bar(timestep.to(self.device))
        return alpha_bar.sqrt() * output + (1 - alpha_bar).sqrt() * latents.to(self.device)
