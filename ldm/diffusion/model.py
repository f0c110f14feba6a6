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
from torch import nn

from ldm.diffusion.text_layers import text_layers
from ldm.diffusion.text_model import TextModel, canonical_name, own_config
from ldm.diffusion.tokenizer import tokenizer_digest
from ldm.io.tensors import check_finite, tensor_digest

_MAX_PIXELS = 512 * 512  # that the autoencoder takes in one pass: its memory grows with them


@dataclass
class DiffusionModel(TextModel):
    """Frozen parts of a Stable Diffusion model (1.x, 2.x or XL) on one device.

    The U-Net is held in `dtype`, all else in float32. The text encoders and the autoencoder come to the device when
    needed, and leave it by `offload`. `scheduler` is a template, from which `sampling.make_scheduler` makes one.
    """

    checkpoint: Path | None = None  # the single file that it was loaded from

    def __post_init__(self) -> None:
        super().__post_init__()
        # Any: diffusers declares the entries of its configs nowhere, and torch.compile replaces the U-Net
        self.unet: Any = self.pipeline.unet  # a UNet2DConditionModel
        self.vae: Any = self.pipeline.vae  # an AutoencoderKL
        self.text_encoder: Any = self.pipeline.text_encoder  # of XL the first of two
        self.scheduler: Any = self.pipeline.scheduler
        self.is_rounded = False  # by `to`
        for module in (self.unet, self.vae):
            module.requires_grad_(False).eval()
        _ = self.digest, self.text_digest  # of the weights before they are rounded
        self.unet.to(self.device, self.dtype)
        for module in (self.unet, self.vae):  # made of convolutions
            module.to(memory_format=torch.channels_last)
        self._alphas_cumprod: torch.Tensor = self.scheduler.alphas_cumprod.to(self.device)  # (num_train_timesteps,)

    @property
    def image_size(self) -> int:
        """Return the side of an image in pixels."""
        return self.unet.config.sample_size * 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Return the shape (C, h, w) of one image's latents."""
        return self.unet.config.in_channels, self.unet.config.sample_size, self.unet.config.sample_size

    @property
    def context_dim(self) -> int:
        """Return d, the size of a token's embedding."""
        return self.unet.config.cross_attention_dim

    @property
    def text_layers(self) -> dict[str, nn.Linear]:
        """Return the linear layers of the U-Net that see the prompt alone, by name."""
        return text_layers(self.unet)

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
        for module_name, module in {**self._text_encoders, "unet": self.unet}.items():
            own = {name for name, _ in module.named_buffers()}
            for name, value in module.state_dict().items():
                known = name if module_name == "unet" else canonical_name(name)
                if value.is_floating_point():
                    (buffers if name in own else parameters)[f"{module_name}.{known}"] = value
        weights = tensor_digest(parameters)
        version_1 = tensor_digest(parameters | buffers) if buffers else weights
        tokenizers = [tokenizer_digest(tokenizer) for tokenizer in self._tokenizers]
        configs = [own_config(module) for module in (*self._text_encoders.values(), self.unet)]
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

    def offload(self) -> None:
        """Move text encoders and autoencoder to the CPU, until they are needed again."""
        for module in (*self._text_encoders.values(), self.vae):
            module.cpu()

    def replicate_unet(self, device: torch.device) -> DiffusionModel:
        """Return the same model with a copy of its U-Net on another device, for passes that run beside this one's."""
        replica = copy(self)
        replica.device, replica.unet = device, deepcopy(self.unet).to(device)
        replica._alphas_cumprod = self._alphas_cumprod.to(device)
        return replica

    def to(self, dtype: torch.dtype) -> None:
        """Round all weights to `dtype`, for a model that is only to be saved. Raises ValueError where one overflows."""
        for module in (*self._text_encoders.values(), self.unet, self.vae):
            for name, weight in module.named_parameters():
                check_finite({name: weight.to(dtype)}, f"{self.name} in {dtype}")
        self.pipeline.to(dtype=dtype)
        self.is_rounded = dtype != torch.float32

    def encode_uncond(self) -> torch.Tensor:
        """Embed the unconditional prompt, (1, rows, d): the empty one; for XL zeros, if its pipeline says so."""
        uncond_embeds = self.encode_prompt([""])
        if self.pipeline.config.get("force_zeros_for_empty_prompt"):
            return torch.zeros_like(uncond_embeds)
        return uncond_embeds

    @torch.no_grad()
    def encode_image(self, images: torch.Tensor) -> torch.Tensor:
        """Encode images (N, 3, H, W) in [-1, 1] as scaled latents (N, C, h, w), the means of the posterior."""
        self.vae.to(self.device)
        batches = (batch.to(self.device, self.vae.dtype) for batch in images.split(self._vae_batch_size()))
        latents = torch.cat([self.vae.encode(batch).latent_dist.mean for batch in batches])
        mean, std = self._latent_statistics()
        return (latents - mean) * self.vae.config.scaling_factor / std

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Decode scaled latents (N, C, h, w) to images (N, 3, H, W), about in [-1, 1]."""
        self.vae.to(self.device)
        scale = self.vae.config.scaling_factor
        mean, std = self._latent_statistics()
        batches = (batch.to(self.vae.dtype) * std / scale + mean for batch in latents.split(self._vae_batch_size()))
        return torch.cat([self.vae.decode(batch).sample for batch in batches])

    def _latent_statistics(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the mean and the deviation of unscaled latents, (1, C, 1, 1): 0 and 1 where the autoencoder says none.

        XL's alone may say them, as in diffusers. `force_upcast` of its config has nothing to do here: the autoencoder
        is always held in float32.
        """
        config = self.vae.config
        channels = config.latent_channels
        mean = torch.tensor(config.latents_mean or [0.0] * channels, device=self.device, dtype=self.vae.dtype)
        std = torch.tensor(config.latents_std or [1.0] * channels, device=self.device, dtype=self.vae.dtype)
        return mean.view(1, -1, 1, 1), std.view(1, -1, 1, 1)

    def _vae_batch_size(self) -> int:
        return max(1, _MAX_PIXELS // self.image_size**2)

    def _alpha_bar(self, timestep: torch.Tensor) -> torch.Tensor:
        """Return a_t, the cumulative product of alphas at `timestep` (N,) or (), as (N, 1, 1, 1)."""
        index = timestep.round().long() if timestep.is_floating_point() else timestep
        return self._alphas_cumprod[index].view(-1, 1, 1, 1)

    def add_noise(self, latents: torch.Tensor, noise: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        """Return z_t = sqrt(a_t) z + sqrt(1 - a_t) noise, (N, C, h, w), with a_t the cumulative product of alphas.

        `latents` and `noise` are (N, C, h, w), `timestep` is (N,).
        """
        alpha_bar = self._alpha_bar(timestep).to(latents.dtype)
        return alpha_bar.sqrt() * latents + (1 - alpha_bar).sqrt() * noise

    def unet_output(self, latents: torch.Tensor, timestep: torch.Tensor, prompt_embeds: torch.Tensor) -> torch.Tensor:
        """Return what the U-Net predicts, the noise or the velocity, (N, C, h, w) in float32.

        `latents` are (N, C, h, w), `timestep` is () or (N,), `prompt_embeds` are (N, rows, d).
        """
        conditions: dict[str, Any] = {}
        if self._pooled_dim:
            size = [self.image_size] * 2  # original size, crop offset (0, 0), target size
            time_ids = torch.tensor([[*size, 0, 0, *size]], device=self.device, dtype=self.dtype)  # (1, 6)
            conditions["added_cond_kwargs"] = {
                "text_embeds": prompt_embeds[:, -1, : self._pooled_dim].to(self.device, self.dtype),  # (N, pooled)
                "time_ids": time_ids.expand(len(latents), -1),  # (N, 6)
            }
        return self.unet(
            latents.to(self.device, self.dtype),
            timestep.to(self.device),
            encoder_hidden_states=self.drop_pooled(prompt_embeds).to(self.device, self.dtype),
            **conditions,
        ).sample.float()

    def predict_noise(self, latents: torch.Tensor, timestep: torch.Tensor, prompt_embeds: torch.Tensor) -> torch.Tensor:
        """Return eps(z_t, t, e), (N, C, h, w) in float32; the arguments are those of `unet_output`.

        Of a velocity v it is `sqrt(a_t) v + sqrt(1 - a_t) z_t` (Salimans and Ho, arXiv 2202.00512).
        """
        output = self.unet_output(latents, timestep, prompt_embeds)
        if self.scheduler.config.get("prediction_type", "epsilon") == "epsilon":
            return output
        alpha_bar = self._alpha_bar(timestep.to(self.device))
        return alpha_bar.sqrt() * output + (1 - alpha_bar).sqrt() * latents.to(self.device)
