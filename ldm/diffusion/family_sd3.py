"""Stable Diffusion 3 and 3.5: a flow under the tokens of two CLIPs on those of T5, and the CLIPs' pooled embeddings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ldm.diffusion.family import (
    BUT_ONE,
    PROMPTS_AND_POOLED,
    Encoded,
    Family,
    ModelSpec,
    TextSource,
    timesteps,
    widths,
)


class StableDiffusion3(Family):
    """Stable Diffusion 3 and 3.5. Without its third text encoder T5's rows are zeros, which are no rows."""

    needs = ("text_encoder", "text_encoder_2")
    reader = "text_encoder_3"
    outputs = PROMPTS_AND_POOLED
    joins_gates = True
    kohya_names: Mapping[str, str] = {
        "context_embedder": "context_embedder",
        "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
    }
    narrow: Mapping[str, Any] = {**Family.narrow, "caption_projection_dim": 8}

    def num_tokens(self, pipe: Any) -> int:
        return pipe.tokenizer_max_length + super().num_tokens(pipe)

    def sources(self, pipe: Any) -> list[TextSource]:
        clips = [name for name in ("text_encoder", "text_encoder_2") if getattr(pipe, name) is not None]
        first = slice(0, pipe.tokenizer_max_length)
        sources: list[TextSource] = []
        start = 0
        for name, columns in zip(clips, widths([getattr(pipe, name) for name in clips]), strict=True):
            end = start + getattr(pipe, name).config.projection_dim
            sources.append(TextSource(name, first, columns, slice(start, end), BUT_ONE))
            start = end
        if pipe.text_encoder_3 is not None:
            sources.append(TextSource("text_encoder_3", slice(first.stop, None), slice(None)))
        return sources

    def encode(self, pipe: Any, prompts: list[str], device: torch.device) -> Encoded:
        tokens, _, pooled, _ = pipe.encode_prompt(
            prompts, None, None, device=device, do_classifier_free_guidance=False, **self.prompt_options(pipe)
        )
        return Encoded(tokens, pooled)

    def predict(
        self, denoiser: Any, latents: torch.Tensor, timestep: torch.Tensor, prompts: Encoded, image_size: int
    ) -> torch.Tensor:
        return denoiser(
            hidden_states=latents,
            timestep=timesteps(timestep, latents),
            encoder_hidden_states=prompts.tokens,
            pooled_projections=prompts.pooled,
        ).sample

    def call_inputs(self, prompts: Encoded, negative: Encoded | None) -> dict[str, Any]:
        inputs: dict[str, Any] = {}
        for prefix, given in (("", prompts), ("negative_", negative)):
            if given is not None:
                inputs |= {f"{prefix}prompt_embeds": given.tokens, f"{prefix}pooled_prompt_embeds": given.pooled}
        return inputs

    def model_spec(self, pipe: Any) -> ModelSpec:
        config, version = pipe.transformer.config, "3-medium"
        if config.qk_norm is not None:
            version = "3-5-medium" if config.dual_attention_layers else "3-5-large"
        return ModelSpec(f"stable-diffusion-3-{version}", version, "networks.lora_sd3")
