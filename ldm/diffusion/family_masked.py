"""Families with one text encoder whose padding is masked: PixArt, Sana, AuraFlow and Lumina 2."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch

from ldm.diffusion.family import Encoded, Family, negatives_of, timesteps

_PIXART_MICRO_CONDITIONS = 128  # the size of latents from which on PixArt is told the image's size


def _lowered(text: str) -> str:
    """Return a prompt as PixArt and Sana have it read."""
    return text.lower().strip()


class PixArt(Family):
    """PixArt alpha and Sigma: a diffusion that predicts noise, and its variance, under the tokens of T5."""

    is_flow = False
    call_options: Mapping[str, Any] = {"use_resolution_binning": False}
    narrow: Mapping[str, Any] = {**Family.narrow, "attention_head_dim": 24, "cross_attention_dim": 24}

    def template(self, pipe: Any, options: Mapping[str, Any], is_negative: bool) -> Callable[[str], str]:
        return _lowered

    def predict(
        self, denoiser: Any, latents: torch.Tensor, timestep: torch.Tensor, prompts: Encoded, image_size: int
    ) -> torch.Tensor:
        config = denoiser.config
        added: dict[str, Any] = {"resolution": None, "aspect_ratio": None}
        if config.sample_size == _PIXART_MICRO_CONDITIONS:
            number = len(latents)
            added = {
                "resolution": latents.new_full((number, 2), image_size),
                "aspect_ratio": latents.new_ones(number, 1),
            }
        output = denoiser(
            latents,
            encoder_hidden_states=prompts.tokens,
            encoder_attention_mask=prompts.mask,
            timestep=timesteps(timestep, latents),
            added_cond_kwargs=added,
        ).sample
        return output[:, : config.in_channels]  # and not its variance

    def key_inputs(self, denoiser: Any, tokens: torch.Tensor) -> torch.Tensor:
        return denoiser.caption_projection(tokens)

    def step_callback(self, keep: Callable[[torch.Tensor], None]) -> dict[str, Any]:
        return {"callback": lambda step, timestep, latents: keep(latents), "callback_steps": 1}

    def text_dims(self, config: Mapping[str, Any]) -> tuple[int, int]:
        return int(config["caption_channels"]), 0


class Sana(Family):
    """Sana: a flow under the tokens of Gemma, which is told before each prompt what to do with it."""

    reads_negatives_alike = False
    pads_right = True
    call_options: Mapping[str, Any] = {"use_resolution_binning": False}
    narrow: Mapping[str, Any] = {
        **Family.narrow,
        "num_cross_attention_heads": 1,
        "cross_attention_head_dim": 8,
        "cross_attention_dim": 8,
    }

    def _instruction(self, pipe: Any) -> list[str]:
        return inspect.signature(type(pipe).__call__).parameters["complex_human_instruction"].default

    def template(self, pipe: Any, options: Mapping[str, Any], is_negative: bool) -> Callable[[str], str]:
        told = "" if is_negative else _told(options)
        return lambda text: told + _lowered(text)

    def rows_of(self, state: torch.Tensor, number: int) -> torch.Tensor:
        return torch.cat([state[:, :1], state[:, 1 - number :]], dim=1)

    def dropped(self, pipe: Any, options: Mapping[str, Any]) -> slice:
        told = _told(options)
        return slice(1, len(pipe.tokenizer.encode(told)) - 1) if told else slice(0)

    def prompt_options(self, pipe: Any) -> dict[str, Any]:
        return {**super().prompt_options(pipe), "complex_human_instruction": self._instruction(pipe)}

    def encode_negative(self, pipe: Any, prompts: list[str], device: torch.device) -> Encoded:
        return negatives_of(pipe, prompts, device=device, max_sequence_length=self.num_tokens(pipe))

    def predict(
        self, denoiser: Any, latents: torch.Tensor, timestep: torch.Tensor, prompts: Encoded, image_size: int
    ) -> torch.Tensor:
        return denoiser(
            latents,
            encoder_hidden_states=prompts.tokens,
            encoder_attention_mask=prompts.mask,
            timestep=timesteps(timestep, latents) * denoiser.config.timestep_scale,
        ).sample

    def key_inputs(self, denoiser: Any, tokens: torch.Tensor) -> torch.Tensor:
        return denoiser.caption_norm(denoiser.caption_projection(tokens))

    def encode_image(self, pipe: Any, images: torch.Tensor) -> torch.Tensor:
        return pipe.vae.encode(images).latent * pipe.vae.config.scaling_factor

    def text_dims(self, config: Mapping[str, Any]) -> tuple[int, int]:
        return int(config["caption_channels"]), 0


def _told(options: Mapping[str, Any]) -> str:
    """Return what Gemma is told before a prompt."""
    return "\n".join(options["complex_human_instruction"] or ())


class AuraFlow(Family):
    """AuraFlow: a flow under the tokens of a T5, in which masked rows are zeros."""

    narrow: Mapping[str, Any] = {
        **Family.narrow,
        "num_mmdit_layers": 1,
        "num_single_dit_layers": 1,
        "caption_projection_dim": 8,
    }

    def predict(
        self, denoiser: Any, latents: torch.Tensor, timestep: torch.Tensor, prompts: Encoded, image_size: int
    ) -> torch.Tensor:
        return denoiser(
            latents, encoder_hidden_states=prompts.tokens, timestep=timesteps(timestep, latents).to(latents) / 1000
        ).sample

    def encode(self, pipe: Any, prompts: list[str], device: torch.device) -> Encoded:
        tokens, *_ = pipe.encode_prompt(
            prompts, do_classifier_free_guidance=False, device=device, **self.prompt_options(pipe)
        )
        return Encoded(tokens)  # whose masked rows are zeros already
