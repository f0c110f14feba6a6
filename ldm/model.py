"""A text-to-image diffusion model as five verbs. Above this file only diffusers modules exist."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.utils import logging as diffusers_logging
from omegaconf import DictConfig, OmegaConf
from safetensors import SafetensorError
from transformers import CLIPTextModel, CLIPTokenizer
from transformers.utils import logging as transformers_logging

from ldm.checkpoint import tensor_digest
from ldm.concepts import ROOT
from ldm.images import RECIPE


@dataclass
class TextToImage:
    """Frozen parts of a Stable Diffusion model on one device. `scheduler` is a template: copy it before sampling."""

    name: str
    base: str  # whose settings it takes: its own name, or that of the model it was merged from
    tokenizer: CLIPTokenizer
    text_encoder: CLIPTextModel
    unet: UNet2DConditionModel
    vae: AutoencoderKL
    scheduler: object
    device: torch.device

    def __post_init__(self):
        for part in (self.text_encoder, self.unet, self.vae):
            part.requires_grad_(False).eval().to(self.device)
        for part in (self.unet, self.vae):  # made of convolutions
            part.to(memory_format=torch.channels_last)
        self._noise_levels = self.scheduler.alphas_cumprod.to(self.device)

    @property
    def dtype(self) -> torch.dtype:
        return self.unet.dtype

    @property
    def image_size(self) -> int:
        """Pixels on a side."""
        return self.unet.config.sample_size * 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        return self.unet.config.in_channels, self.unet.config.sample_size, self.unet.config.sample_size

    @property
    def steps(self) -> int:
        """The number of diffusion steps of training."""
        return self.scheduler.config.num_train_timesteps

    @cached_property
    def digest(self) -> str:
        """Identifies the base model: text encoder and U-Net, as loaded. Taken before any shift is merged."""
        tensors = {f"text_encoder.{name}": value for name, value in self.text_encoder.state_dict().items()}
        tensors |= {f"unet.{name}": value for name, value in self.unet.state_dict().items()}
        return tensor_digest({name: value for name, value in tensors.items() if value.is_floating_point()})

    @cached_property
    def drawn_by(self) -> dict:
        """What decides this model's pictures beside prompt, seed, steps and guidance; taken before any shift is merged."""
        config = {name: value for name, value in self.scheduler.config.items() if not name.startswith("_")}
        return {"model_digest": self.digest, "decoder_digest": tensor_digest(self.vae.state_dict()),
                "scheduler": type(self.scheduler).__name__, "scheduler_config": config}

    @torch.no_grad()
    def encode_prompt(self, prompts: list[str]) -> torch.Tensor:
        """Prompts as embeddings (N, tokens, d), padded and cut to the model's number of tokens."""
        tokens = self.tokenizer(prompts, padding="max_length", max_length=self.tokenizer.model_max_length,
                                truncation=True, return_tensors="pt").input_ids
        return self.text_encoder(tokens.to(self.device))[0]

    @torch.no_grad()
    def encode_image(self, images: torch.Tensor) -> torch.Tensor:
        """(N, 3, H, W) in [-1, 1] -> scaled latents (N, C, h, w), the posterior's mean."""
        latents = self.vae.encode(images.to(self.device, self.dtype)).latent_dist.mean
        return latents * self.vae.config.scaling_factor

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Scaled latents (N, C, h, w) -> images (N, 3, H, W), about [-1, 1]."""
        return self.vae.decode(latents / self.vae.config.scaling_factor).sample

    def add_noise(self, latents: torch.Tensor, noise: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
        """z_t = sqrt(a_t) z + sqrt(1 - a_t) noise, with a_t the cumulative product of alphas at `step` (N,)."""
        kept = self._noise_levels[step].to(latents.dtype).view(-1, 1, 1, 1)
        return kept.sqrt() * latents + (1 - kept).sqrt() * noise

    def predict_noise(self, latents: torch.Tensor, step: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
        """eps(z_t, t, e): latents (N, C, h, w), step scalar or (N,), embedding (N, tokens, d) -> (N, C, h, w)."""
        return self.unet(latents, step, encoder_hidden_states=embedding).sample


def load(source: str | Path, device: torch.device) -> TextToImage:
    """Open a diffusers folder, or a hub id where a hub can be reached, as a `TextToImage` in float32.

    Raises ValueError when `source` is not such a model or predicts something other than the noise.
    """
    if Path(source).suffix in {".ckpt", ".safetensors", ".pt"}:
        raise ValueError(f"{source} is a single-file checkpoint, which this version does not load yet: "
                         "pass a diffusers folder to --model")
    diffusers_logging.set_verbosity_error()
    transformers_logging.set_verbosity_error()
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    try:
        pipeline = StableDiffusionPipeline.from_pretrained(
            str(source), dtype=torch.float32, safety_checker=None, requires_safety_checker=False, use_safetensors=True)
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"cannot load a model from '{source}': pass --model the path of a diffusers folder "
                         f"(or a hub id, with a network): {' '.join(str(error).split())[:200]}") from error
    if pipeline.scheduler.config.get("prediction_type", "epsilon") != "epsilon":
        raise ValueError(f"{source} predicts '{pipeline.scheduler.config.prediction_type}', and this version "
                         "erases only from models that predict the noise (epsilon)")
    name = Path(source).resolve().name if Path(source).is_dir() else str(source).replace("/", "--")
    recipe = Path(source) / RECIPE
    base = json.loads(recipe.read_text()).get("base", name) if recipe.is_file() else name
    return TextToImage(name, base, pipeline.tokenizer, pipeline.text_encoder, pipeline.unet, pipeline.vae,
                       pipeline.scheduler, device)


def save(model: TextToImage, folder: Path) -> None:
    """Write the model, as its weights stand now, as a diffusers folder in its own precision."""
    pipeline: DiffusionPipeline = StableDiffusionPipeline(
        vae=model.vae, text_encoder=model.text_encoder, tokenizer=model.tokenizer, unet=model.unet,
        scheduler=model.scheduler, safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    pipeline.save_pretrained(folder, safe_serialization=True)


def settings(name: str) -> DictConfig:
    """The sampling and erasure settings of a model: `configs/NAME.yaml`, else those of Stable Diffusion v1."""
    own = ROOT / "configs" / f"{name}.yaml"
    return OmegaConf.load(own if own.is_file() else ROOT / "configs" / "stable-diffusion" / "v1-inference.yaml")
