"""FLUX.1, dev and schnell: a flow under the tokens of T5 and the pooled embedding of CLIP."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from diffusers import FluxPipeline

from ldm.diffusion.family import PROMPT, Encoded, Family, ModelSpec, TextSource, square_side, timesteps


class Flux(Family):
    """FLUX.1. Its guidance is an input of dev's transformer, and schnell has none. Latents are packed, (N, s, C)."""

    needs = ("text_encoder", "text_encoder_2")
    reader = "text_encoder_2"
    outputs = (PROMPT, f"pooled_{PROMPT}", "text_ids")
    joins_gates = True
    kohya_names: Mapping[str, str] = {
        "context_embedder": "txt_in",
        "time_text_embed.text_embedder.linear_1": "vector_in.in_layer",
    }
    narrow: Mapping[str, Any] = {
        **Family.narrow,
        "num_single_layers": 1,
        "attention_head_dim": 16,
        "axes_dims_rope": (4, 6, 6),
    }

    def guides(self, pipe: Any) -> bool:
        return False

    def sources(self, pipe: Any) -> list[TextSource]:
        return [TextSource("text_encoder_2", slice(None), slice(None)), TextSource("text_encoder", pooled=slice(None))]

    def encode(self, pipe: Any, prompts: list[str], device: torch.device) -> Encoded:
        tokens, pooled, _ = pipe.encode_prompt(prompts, None, device=device, max_sequence_length=self.num_tokens(pipe))
        return Encoded(tokens, pooled)

    def predict(
        self, denoiser: Any, latents: torch.Tensor, timestep: torch.Tensor, prompts: Encoded, image_size: int
    ) -> torch.Tensor:
        side, device = square_side(latents.shape[1]), latents.device
        image_ids = FluxPipeline._prepare_latent_image_ids(1, side, side, device, latents.dtype)
        guidance = None
        if denoiser.config.guidance_embeds:
            scale = inspect.signature(FluxPipeline.__call__).parameters["guidance_scale"].default
            guidance = torch.full([len(latents)], scale, device=device, dtype=torch.float32)
        return denoiser(
            hidden_states=latents,
            timestep=timesteps(timestep, latents).to(latents.dtype) / 1000,
            guidance=guidance,
            pooled_projections=prompts.pooled,
            encoder_hidden_states=prompts.tokens,
            txt_ids=torch.zeros(prompts.tokens.shape[1], 3, device=device, dtype=latents.dtype),
            img_ids=image_ids,
        ).sample

    def call_inputs(self, prompts: Encoded, negative: Encoded | None) -> dict[str, Any]:
        return {"prompt_embeds": prompts.tokens, "pooled_prompt_embeds": prompts.pooled}

    def model_spec(self, pipe: Any) -> ModelSpec:
        architecture = "flux-1-dev" if pipe.transformer.config.guidance_embeds else "flux-1-schnell"
        return ModelSpec(architecture, "flux1", "networks.lora_flux", "https://github.com/black-forest-labs/flux")

    def image_size(self, pipe: Any) -> int:
        return pipe.vae.config.sample_size

    def shape_of(self, config: Any, side: int) -> tuple[int, ...]:
        return (side // 2) ** 2, config["in_channels"]

    def encode_image(self, pipe: Any, images: torch.Tensor) -> torch.Tensor:
        latents = super().encode_image(pipe, images)
        return FluxPipeline._pack_latents(latents, *latents.shape)

    def decode(self, pipe: Any, latents: torch.Tensor) -> torch.Tensor:
        side = 2 * square_side(latents.shape[1]) * pipe.vae_scale_factor
        return super().decode(pipe, FluxPipeline._unpack_latents(latents, side, side, pipe.vae_scale_factor))
