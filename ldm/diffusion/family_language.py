"""Families that read with a language model: FLUX.2, FLUX.2 klein and Lumina 2."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from diffusers import Flux2KleinPipeline, Flux2Pipeline
from diffusers.pipelines.flux2.pipeline_flux2 import format_input

from ldm.diffusion.family import (
    BUT_ONE,
    PROMPT,
    Encoded,
    Family,
    ModelSpec,
    TextSource,
    negatives_of,
    square_side,
    timesteps,
)


class Flux2(Family):
    """FLUX.2 and klein: a flow under three hidden states of a language model side by side. Latents are packed."""

    outputs = (PROMPT, "text_ids")
    kohya_names: Mapping[str, str] = {"context_embedder": "txt_in"}
    narrow: Mapping[str, Any] = {
        **Family.narrow,
        "num_single_layers": 1,
        "attention_head_dim": 16,
        "axes_dims_rope": (4, 4, 4, 4),
    }

    def guides(self, pipe: Any) -> bool:
        return isinstance(pipe, Flux2KleinPipeline) and not pipe.config["is_distilled"]

    def sources(self, pipe: Any) -> list[TextSource]:
        layers = inspect.signature(type(pipe).__call__).parameters["text_encoder_out_layers"].default
        return [TextSource("text_encoder", slice(None), slice(None), states=tuple(layers))]

    def template(self, pipe: Any, options: Mapping[str, Any], is_negative: bool) -> Callable[[str], str]:
        return partial(_chat, pipe)

    def encode(self, pipe: Any, prompts: list[str], device: torch.device) -> Encoded:
        return Encoded(pipe.encode_prompt(prompts, device=device, max_sequence_length=self.num_tokens(pipe))[0])

    def predict(
        self, denoiser: Any, latents: torch.Tensor, timestep: torch.Tensor, prompts: Encoded, image_size: int
    ) -> torch.Tensor:
        number, side = len(latents), square_side(latents.shape[1])
        image_ids = Flux2KleinPipeline._prepare_latent_ids(latents.new_zeros(number, 1, side, side))
        guidance = latents.new_full((number,), 4.0) if denoiser.config.guidance_embeds else None
        return denoiser(
            hidden_states=latents,
            timestep=timesteps(timestep, latents).to(latents.dtype) / 1000,
            guidance=guidance,
            encoder_hidden_states=prompts.tokens,
            txt_ids=Flux2KleinPipeline._prepare_text_ids(prompts.tokens).to(latents.device),
            img_ids=image_ids.to(latents.device),
        ).sample

    def call_inputs(self, prompts: Encoded, negative: Encoded | None) -> dict[str, Any]:
        negatives = {"negative_prompt_embeds": negative.tokens} if negative is not None else {}
        return {"prompt_embeds": prompts.tokens, **negatives}

    def image_size(self, pipe: Any) -> int:
        return pipe.vae.config.sample_size

    def shape_of(self, config: Any, side: int) -> tuple[int, ...]:
        return (side // 2) ** 2, config["in_channels"]

    def encode_image(self, pipe: Any, images: torch.Tensor) -> torch.Tensor:
        latents = pipe._patchify_latents(pipe.vae.encode(images).latent_dist.mean)
        mean, std = self._statistics(pipe)
        return pipe._pack_latents((latents - mean) / std)

    def decode(self, pipe: Any, latents: torch.Tensor) -> torch.Tensor:
        side = square_side(latents.shape[1])
        unpacked = latents.permute(0, 2, 1).reshape(len(latents), -1, side, side)
        mean, std = self._statistics(pipe)
        return pipe.vae.decode(pipe._unpatchify_latents(unpacked * std + mean)).sample

    def _statistics(self, pipe: Any) -> tuple[torch.Tensor, torch.Tensor]:
        norm = pipe.vae.bn
        return norm.running_mean.view(1, -1, 1, 1), (norm.running_var.view(1, -1, 1, 1) + norm.eps).sqrt()


def _chat(pipe: Any, prompt: str) -> str:
    """Return the text that FLUX.2 has its language model read for a prompt."""
    if isinstance(pipe, Flux2Pipeline):
        messages = format_input([prompt], pipe.system_message)[0]
        text = pipe.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=False)
        return text.removeprefix(pipe.tokenizer.tokenizer.bos_token or "")  # which the tokenizer puts there itself
    messages = [{"role": "user", "content": prompt}]
    return pipe.tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True, enable_thinking=False
    )


class Lumina2(Family):
    """Lumina 2: a flow under the tokens of Gemma, after a norm. It predicts the way from noise to clean latents."""

    reads_negatives_alike = False
    pads_right = True
    kohya_names: Mapping[str, str] = {"time_caption_embed.caption_embedder.1": "cap_embedder.1"}
    narrow: Mapping[str, Any] = {
        "num_layers": 1,
        "num_refiner_layers": 1,
        "hidden_size": 24,
        "num_attention_heads": 1,
        "num_kv_heads": 1,
        "axes_dim_rope": (8, 8, 8),
        "multiple_of": 8,
    }

    def sources(self, pipe: Any) -> list[TextSource]:
        return [TextSource("text_encoder", slice(None), slice(None), states=BUT_ONE)]

    def template(self, pipe: Any, options: Mapping[str, Any], is_negative: bool) -> Callable[[str], str]:
        told = options.get("system_prompt")
        return str if is_negative else f"{pipe.system_prompt if told is None else told} <Prompt Start> ".__add__

    def encode_negative(self, pipe: Any, prompts: list[str], device: torch.device) -> Encoded:
        return negatives_of(pipe, prompts, device=device, max_sequence_length=self.num_tokens(pipe))

    def predict(
        self, denoiser: Any, latents: torch.Tensor, timestep: torch.Tensor, prompts: Encoded, image_size: int
    ) -> torch.Tensor:
        output = denoiser(
            hidden_states=latents,
            timestep=1 - timesteps(timestep, latents).to(latents.dtype) / 1000,
            encoder_hidden_states=prompts.tokens,
            encoder_attention_mask=prompts.mask,
        ).sample
        return -output

    def image_size(self, pipe: Any) -> int:
        return pipe.default_sample_size * pipe.vae_scale_factor

    def text_dims(self, config: Mapping[str, Any]) -> tuple[int, int]:
        return int(config["cap_feat_dim"]), 0

    def model_spec(self, pipe: Any) -> ModelSpec:
        return ModelSpec(
            "lumina-2", "lumina2", "networks.lora_lumina", "https://github.com/Alpha-VLLM/Lumina-Image-2.0"
        )
