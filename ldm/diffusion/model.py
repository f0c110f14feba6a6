"""TODO diffusion.model."""

from __future__ import annotations

from collections.abc import Iterable
from copy import copy, deepcopy
from dataclasses import dataclass
from diffusers import AutoencoderKL, StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from functools import cached_property
from pathlib import Path
import torch
import torch.nn.functional as F
from ldm.io.tensors import tensor_digest


_MAX_WORDS = 512


_MAX_PIXELS = 512 * 512  # that the autoencoder takes at once: its memory grows with them


@dataclass
class DiffusionModel:
    """Frozen parts of a Stable Diffusion model on one device: 1.x, 2.x or XL. `scheduler` is a template: copy it before
    sampling. The U-Net is held in `dtype`, all else in float32; the text encoders and the autoencoder come to the device
    when they are needed, and leave it when asked to (`park`)."""

    name: str
    base: str  # whose settings it takes: its own name, or that of the model it was merged from
    pipeline: StableDiffusionPipeline | StableDiffusionXLPipeline
    device: torch.device
    dtype: torch.dtype = torch.float32
    checkpoint: Path | None = None  # the single file that it was loaded from

    def __post_init__(self):
        self.unet: UNet2DConditionModel = self.pipeline.unet
        self.vae: AutoencoderKL = self.pipeline.vae
        self.text_encoder = self.pipeline.text_encoder  # of XL the first of two
        self.scheduler = self.pipeline.scheduler
        self._encoders = {name: part for name in ("text_encoder", "text_encoder_2")
                          if (part := getattr(self.pipeline, name, None)) is not None}
        for part in (*self._encoders.values(), self.unet, self.vae):
            part.requires_grad_(False).eval()
        self.digest  # of the weights before they are rounded
        self.unet.to(self.device, self.dtype)
        for part in (self.unet, self.vae):  # made of convolutions
            part.to(memory_format=torch.channels_last)
        self._noise_levels = self.scheduler.alphas_cumprod.to(self.device)

    @property
    def image_size(self) -> int:
        """Pixels on a side."""
        return self.unet.config.sample_size * 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        return self.unet.config.in_channels, self.unet.config.sample_size, self.unet.config.sample_size

    @property
    def width(self) -> int:
        """d, the size of a token's embedding."""
        return self.unet.config.cross_attention_dim

    @property
    def steps(self) -> int:
        """The number of diffusion steps of training."""
        return self.scheduler.config.num_train_timesteps

    @property
    def _pooled(self) -> int:
        """The size of XL's pooled embedding, which goes to the U-Net beside the tokens; 0 where there is none."""
        return self._encoders["text_encoder_2"].config.projection_dim if "text_encoder_2" in self._encoders else 0

    @cached_property
    def digest(self) -> str:
        """Identifies the base model: text encoders and U-Net, as loaded. Taken before any shift is merged."""
        tensors = {f"{kind}.{name.removeprefix('text_model.')}": value  # which only some versions of transformers put before
                   for kind, part in self._encoders.items() for name, value in part.state_dict().items()}
        tensors |= {f"unet.{name}": value for name, value in self.unet.state_dict().items()}
        return tensor_digest({name: value for name, value in tensors.items() if value.is_floating_point()})

    @cached_property
    def generation_metadata(self) -> dict:
        """What decides this model's pictures beside prompt, seed, steps and guidance; taken before any shift is merged."""
        config = {name: value for name, value in self.scheduler.config.items() if not name.startswith("_")}
        rounded = {} if self.dtype == torch.float32 else {"dtype": str(self.dtype)}
        return {"model_digest": self.digest, "decoder_digest": tensor_digest(self.vae.state_dict()),
                "scheduler": type(self.scheduler).__name__, "scheduler_config": config} | rounded

    def offload(self) -> None:
        """Text encoders and autoencoder leave the device, until they are needed again."""
        for part in (*self._encoders.values(), self.vae):
            part.cpu()

    def replicate_unet(self, device: torch.device) -> DiffusionModel:
        """The same model with its U-Net once more, on another device, for passes that run beside this one's."""
        other = copy(self)
        other.device, other.unet = device, deepcopy(self.unet).to(device)
        other._noise_levels = self._noise_levels.to(device)
        return other

    def to(self, dtype: torch.dtype) -> None:
        """Round all weights to `dtype`, for a model that is only to be saved."""
        self.pipeline.to(dtype=dtype)

    @torch.no_grad()
    def encode_prompt(self, prompts: list[str]) -> torch.Tensor:
        """Prompts as embeddings (N, rows, d), float32: a row for each of the model's tokens, and for XL one more with the
        pooled embedding, filled up with zeros."""
        for part in self._encoders.values():
            part.to(self.device)
        made = self.pipeline.encode_prompt(prompts, device=self.device, num_images_per_prompt=1,
                                           do_classifier_free_guidance=False)
        if not self._pooled:
            return made[0].float()
        tokens, _, pooled, _ = made
        return torch.cat([tokens, F.pad(pooled, (0, self.width - self._pooled))[:, None]], dim=1).float()

    def encode_uncond(self) -> torch.Tensor:
        """What guidance leads away from, (1, rows, d): the blank prompt; for XL zeros, if its pipeline says so."""
        blank = self.encode_prompt([""])
        return torch.zeros_like(blank) if self.pipeline.config.get("force_zeros_for_empty_prompt") else blank

    def tokens(self, embedding: torch.Tensor) -> torch.Tensor:
        """The rows of embeddings (..., rows, d) that the cross-attention layers see: all but XL's pooled one."""
        return embedding[..., :-1, :] if self._pooled else embedding

    def seen(self, prompts: Iterable[str]) -> dict[str, torch.Tensor]:
        """What the cross-attention layers see of each prompt, (tokens, d)."""
        return {prompt: self.tokens(self.encode_prompt([prompt]))[0] for prompt in prompts}

    @cached_property
    def vocab_gram(self) -> tuple[list[str], torch.Tensor]:
        """Words that the model knows, at most `_WORDS` of its tokenizer's, evenly chosen, and the mean of `e^T e` over what the
        layers see of each alone, e (tokens, d): (d, d), float64."""
        known = self.pipeline.tokenizer.get_vocab()
        words = sorted(word for word in (token.removesuffix("</w>") for token in known if token.endswith("</w>"))
                       if len(word) > 2 and word.isalpha())
        words = words[::max(1, -(-len(words) // _MAX_WORDS))]
        gram = torch.zeros(self.width, self.width, dtype=torch.float64)
        for start in range(0, len(words), 64):
            gram += self._gram(words[start:start + 64])
        return words, gram / max(1, len(words))

    def _gram(self, prompts: list[str]) -> torch.Tensor:
        seen = self.tokens(self.encode_prompt(prompts)).flatten(0, 1).cpu().double()
        return seen.T @ seen

    def vocab_gram_without(self, *spellings: str) -> torch.Tensor:
        """The mean of `vocabulary` without the words, and pieces of words, of `spellings`."""
        words, mean = self.vocab_gram
        pieces = {piece.removesuffix("</w>") for text in spellings for piece in self.pipeline.tokenizer.tokenize(text)}
        own = [word for word in words if word in pieces]
        if not own or len(own) == len(words):
            return mean
        return (mean * len(words) - self._gram(own)) / (len(words) - len(own))

    @torch.no_grad()
    def encode_image(self, images: torch.Tensor) -> torch.Tensor:
        """(N, 3, H, W) in [-1, 1] -> scaled latents (N, C, h, w), the posterior's mean."""
        self.vae.to(self.device)
        latents = torch.cat([self.vae.encode(part.to(self.device, self.vae.dtype)).latent_dist.mean
                             for part in images.split(self._at_once())])
        return latents * self.vae.config.scaling_factor

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Scaled latents (N, C, h, w) -> images (N, 3, H, W), about [-1, 1]."""
        self.vae.to(self.device)
        return torch.cat([self.vae.decode(part.to(self.vae.dtype) / self.vae.config.scaling_factor).sample
                          for part in latents.split(self._at_once())])

    def _at_once(self) -> int:
        return max(1, _MAX_PIXELS // self.image_size ** 2)

    def _kept(self, step: torch.Tensor) -> torch.Tensor:
        """a_t, the cumulative product of alphas at `step` (N,) or (), as (N, 1, 1, 1)."""
        return self._noise_levels[step.round().long() if step.is_floating_point() else step].view(-1, 1, 1, 1)

    def add_noise(self, latents: torch.Tensor, noise: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
        """z_t = sqrt(a_t) z + sqrt(1 - a_t) noise, with a_t the cumulative product of alphas at `step` (N,)."""
        kept = self._kept(step).to(latents.dtype)
        return kept.sqrt() * latents + (1 - kept).sqrt() * noise

    def predict(self, latents: torch.Tensor, step: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
        """What the model's own scheduler expects of it, the noise or the velocity, (N, C, h, w) in float32: latents
        (N, C, h, w), step scalar or (N,), embedding (N, rows, d)."""
        given = {}
        if self._pooled:
            size = [self.image_size] * 2  # as drawn, cut at (0, 0), as wanted
            sizes = torch.tensor([[*size, 0, 0, *size]], device=self.device, dtype=self.dtype)
            given["added_cond_kwargs"] = {"text_embeds": embedding[:, -1, :self._pooled].to(self.device, self.dtype),
                                          "time_ids": sizes.expand(len(latents), -1)}
        return self.unet(latents.to(self.device, self.dtype), step.to(self.device),
                         encoder_hidden_states=self.tokens(embedding).to(self.device, self.dtype), **given).sample.float()

    def predict_noise(self, latents: torch.Tensor, step: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
        """eps(z_t, t, e), likewise; of a velocity v it is `sqrt(a_t) v + sqrt(1 - a_t) z_t` (Salimans and Ho,
        arXiv 2202.00512)."""
        predicted = self.predict(latents, step, embedding)
        if self.scheduler.config.get("prediction_type", "epsilon") == "epsilon":
            return predicted
        kept = self._kept(step.to(self.device))
        return kept.sqrt() * predicted + (1 - kept).sqrt() * latents.to(self.device)
