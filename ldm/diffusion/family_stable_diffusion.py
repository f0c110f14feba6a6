"""Stable Diffusion 1.x, 2.x and XL: a U-Net with cross-attention, whose scheduler is that of a diffusion."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import CLIPTextModel

from ldm.diffusion.family import BUT_ONE, PROMPTS_AND_POOLED, Encoded, Family, ModelSpec, TextSource, widths

STABILITY = "https://github.com/Stability-AI/generative-models"  # the implementation of CompVis' layout and of XL's
_NARROW_WIDTH = 8  # of the blocks of a narrow twin


class StableDiffusion(Family):
    """Stable Diffusion 1.x and 2.x, whose tokens the keys and values of cross-attention see."""

    denoiser = "unet"
    outputs = PROMPTS_AND_POOLED[:2]
    is_flow = False
    samples_by_call = False  # but by `sampling`, whose images were the same in every version

    def prompt_options(self, pipe: Any) -> dict[str, Any]:
        return {}

    def num_tokens(self, pipe: Any) -> int:
        return pipe.tokenizer.model_max_length

    def encode(self, pipe: Any, prompts: list[str], device: torch.device) -> Encoded:
        outputs = pipe.encode_prompt(prompts, device=device, num_images_per_prompt=1, do_classifier_free_guidance=False)
        return Encoded(outputs[0])

    def predict(
        self, denoiser: Any, latents: torch.Tensor, timestep: torch.Tensor, prompts: Encoded, image_size: int
    ) -> torch.Tensor:
        return denoiser(latents, timestep, encoder_hidden_states=prompts.tokens).sample

    def image_size(self, pipe: Any) -> int:
        return pipe.unet.config.sample_size * 2 ** (len(pipe.vae.config.block_out_channels) - 1)

    def latent_shape(self, pipe: Any, side: int) -> tuple[int, ...]:
        config = pipe.unet.config
        return config.in_channels, config.sample_size, config.sample_size

    def narrow_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        heads = config.get("attention_head_dim", 8)
        blocks = len(config["block_out_channels"])
        return {
            **config,
            "block_out_channels": [_NARROW_WIDTH] * blocks,
            "attention_head_dim": [1] * len(heads) if isinstance(heads, list | tuple) else 1,
            "num_attention_heads": None,
            "norm_num_groups": 1,
        }

    def narrow_shape(self, config: Mapping[str, Any]) -> tuple[int, ...]:
        side = 2 ** (len(config["block_out_channels"]) - 1)
        return config.get("in_channels", 4), side, side

    def kohya_name(self, layer: str) -> str:
        return self.kohya_names.get(layer, layer)  # since they call a U-Net's layers as diffusers does, but for few

    def model_spec(self, pipe: Any) -> ModelSpec:
        """Return the version: 2 is told from 1 by its text encoder's activation, and one without CLIP counts as 1."""
        kind, encoder = _prediction_type(pipe), pipe.text_encoder
        suffix = "_v" if kind == "v" else ""
        if not isinstance(encoder, CLIPTextModel) or encoder.config.hidden_act == "quick_gelu":
            return ModelSpec("stable-diffusion-v1", f"sd_v1{suffix}", "networks.lora", prediction_type=kind)
        architecture = "stable-diffusion-v2-768-v" if kind == "v" else "stable-diffusion-v2-512"
        return ModelSpec(architecture, f"sd_v2{suffix}", "networks.lora", prediction_type=kind, is_v2=True)

    def comfyui_encoders(self, pipe: Any) -> dict[str, str]:
        return {"text_encoder": "clip_h" if self.model_spec(pipe).is_v2 else "clip_l"}

    def text_dims(self, config: Mapping[str, Any]) -> tuple[int, int]:
        width = config.get("cross_attention_dim", 1280)
        return (width[0] if isinstance(width, list | tuple) else width), 0


class TextAlone(StableDiffusion):
    """A text encoder by itself, with its pooled embedding, which FLUX and Stable Diffusion 3 take of some."""

    def sources(self, pipe: Any) -> list[TextSource]:
        return [TextSource("text_encoder", slice(None), slice(None), slice(0, pipe.text_encoder.config.hidden_size))]

    def encode(self, pipe: Any, prompts: list[str], device: torch.device) -> Encoded:
        pooled: list[torch.Tensor] = []
        keep: Any = lambda _, inputs, output: pooled.append(output.pooler_output)  # noqa: E731  # a hook
        hook = pipe.text_encoder.register_forward_hook(keep)
        try:
            return Encoded(super().encode(pipe, prompts, device).tokens, torch.cat(pooled))
        finally:
            hook.remove()


class StableDiffusionXL(StableDiffusion):
    """Stable Diffusion XL, which has the pooled embedding of its second text encoder too, beside six sizes."""

    needs = ("text_encoder_2",)
    outputs = PROMPTS_AND_POOLED
    kohya_names: Mapping[str, str] = {"add_embedding.linear_1": "label_emb.0.0"}

    def sources(self, pipe: Any) -> list[TextSource]:
        own = {name: getattr(pipe, name) for name in ("text_encoder", "text_encoder_2")}
        names = [name for name, encoder in own.items() if encoder is not None]  # a refiner has the second alone
        places = widths([own[name] for name in names])
        pooled = slice(0, own["text_encoder_2"].config.projection_dim)
        given = {"text_encoder_2": pooled}
        columns = zip(names, places, strict=True)
        return [TextSource(name, slice(None), place, given.get(name), BUT_ONE) for name, place in columns]

    def encode(self, pipe: Any, prompts: list[str], device: torch.device) -> Encoded:
        outputs = pipe.encode_prompt(prompts, device=device, num_images_per_prompt=1, do_classifier_free_guidance=False)
        return Encoded(outputs[0], outputs[2])

    def predict(
        self, denoiser: Any, latents: torch.Tensor, timestep: torch.Tensor, prompts: Encoded, image_size: int
    ) -> torch.Tensor:
        size = [image_size] * 2  # original size, crop offset (0, 0), target size
        time_ids = torch.tensor([[*size, 0, 0, *size]], device=latents.device, dtype=latents.dtype)  # (1, 6)
        added = {"text_embeds": prompts.pooled, "time_ids": time_ids.expand(len(latents), -1)}
        return denoiser(latents, timestep, encoder_hidden_states=prompts.tokens, added_cond_kwargs=added).sample

    def encode_image(self, pipe: Any, images: torch.Tensor) -> torch.Tensor:
        mean, std = _statistics(pipe.vae)
        return (pipe.vae.encode(images).latent_dist.mean - mean) * pipe.vae.config.scaling_factor / std

    def decode(self, pipe: Any, latents: torch.Tensor) -> torch.Tensor:
        mean, std = _statistics(pipe.vae)
        return pipe.vae.decode(latents * std / pipe.vae.config.scaling_factor + mean).sample

    def model_spec(self, pipe: Any) -> ModelSpec:
        kind = _prediction_type(pipe)
        return ModelSpec("stable-diffusion-xl-v1-base", "sdxl_base_v1-0", "networks.lora", STABILITY, kind)

    def comfyui_encoders(self, pipe: Any) -> dict[str, str]:
        return {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}

    def text_dims(self, config: Mapping[str, Any]) -> tuple[int, int]:
        sizes = 6 * config["addition_time_embed_dim"]
        return super().text_dims(config)[0], config["projection_class_embeddings_input_dim"] - sizes


def _prediction_type(pipe: Any) -> str:
    """Return what ModelSpec calls the prediction of a pipeline's U-Net."""
    return "v" if pipe.scheduler.config.get("prediction_type") == "v_prediction" else "epsilon"


def _statistics(vae: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the mean and the deviation of unscaled latents, (1, C, 1, 1): 0 and 1 where the autoencoder says none.

    `force_upcast` of its config has nothing to do here: the autoencoder is always held in float32.
    """
    config, weight = vae.config, next(vae.parameters())
    mean = weight.new_tensor(config.latents_mean or [0.0] * config.latent_channels)
    std = weight.new_tensor(config.latents_std or [1.0] * config.latent_channels)
    return mean.view(1, -1, 1, 1), std.view(1, -1, 1, 1)
