"""A frozen text-to-image model: embed prompts, encode and decode images, predict the noise."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack
from copy import copy, deepcopy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

from ldm.diffusion.text_states import LAST_STATE, capture_states
from ldm.diffusion.tokenizer import describe_cuts, tokenizer_digest, vocabulary_words
from ldm.io.errors import notify
from ldm.io.tensors import check_finite, tensor_digest

# Of a text encoder's config what its weights do not say.
_ENCODER_SETTINGS = ("hidden_act", "layer_norm_eps", "num_attention_heads", "eos_token_id", "max_position_embeddings")
_MAX_WORDS = 512  # of the vocabulary that the second moment is taken over
_MAX_CHECKED = 10_000  # prompts of which it is remembered that they were looked at
_PROMPTS_AT_ONCE = 64  # that the text encoder embeds in one pass
_MAX_PIXELS = 512 * 512  # that the autoencoder takes in one pass: its memory grows with them


def own_config(module: Any) -> dict[str, Any]:
    """Return what a part's config says beside its weights: what differs from the defaults of its class.

    So it is the same by every version of the library that knows these settings. The size of images is left out.
    """
    if not hasattr(type(module), "load_config"):  # a text encoder of transformers
        return {name: getattr(module.config, name, None) for name in _ENCODER_SETTINGS}
    defaults = inspect.signature(type(module).__init__).parameters
    own = {}
    for name, value in module.config.items():
        plain = list(value) if isinstance(value, tuple) else value
        default = defaults[name].default if name in defaults else None
        if (
            name in defaults
            and name != "sample_size"
            and plain != (list(default) if isinstance(default, tuple) else default)
        ):
            own[name] = plain
    return own


States = Mapping[tuple[str, int], torch.Tensor]  # by text encoder and layer: (N, T, width of that encoder)


class EmbeddingEdit(Protocol):
    """A change of prompt embeddings that may read hidden states of the text encoders, see `edits.edit_embeddings`."""

    @property
    def layers(self) -> Mapping[str, Collection[int]]:
        """The hidden states that it reads, by text encoder."""
        ...

    def __call__(self, prompt_embeds: torch.Tensor, states: States) -> torch.Tensor:
        """Return what becomes of prompt embeddings (N, rows, d); those that it leaves alone keep every bit."""
        ...


@dataclass
class DiffusionModel:
    """Frozen parts of a Stable Diffusion model (1.x, 2.x or XL) on one device.

    The U-Net is held in `dtype`, all else in float32. The text encoders and the autoencoder come to the device when
    needed, and leave it by `offload`. `scheduler` is a template, from which `sampling.make_scheduler` makes one.
    """

    name: str
    config_name: str  # what exports call their base: itself, the model it was merged from, or its config
    pipeline: StableDiffusionPipeline | StableDiffusionXLPipeline
    device: torch.device
    dtype: torch.dtype = torch.float32
    checkpoint: Path | None = None  # the single file that it was loaded from
    embedding_edit: EmbeddingEdit | None = None  # what becomes of prompts' embeddings, by `edits.edit_embeddings`
    remembered: dict[str, torch.Tensor] | None = None  # embeddings of prompts, by `edits.remember_embeddings`
    settings_path: Path | None = None  # the file with its own settings
    edited_by: tuple[str, ...] = ()  # the labels of the shifts that act on it now, by `merge.edited`

    def __post_init__(self) -> None:
        # Any: diffusers declares the entries of its configs nowhere, and torch.compile replaces the U-Net
        self.unet: Any = self.pipeline.unet  # a UNet2DConditionModel
        self.vae: Any = self.pipeline.vae  # an AutoencoderKL
        self.text_encoder: Any = self.pipeline.text_encoder  # of XL the first of two
        self.scheduler: Any = self.pipeline.scheduler
        self._text_encoders: dict[str, Any] = {}
        self._tokenizers: list[Any] = []
        for name in ("text_encoder", "text_encoder_2"):
            encoder = getattr(self.pipeline, name, None)
            if encoder is not None:
                self._text_encoders[name] = encoder
                self._tokenizers.append(getattr(self.pipeline, name.replace("text_encoder", "tokenizer")))
        self.is_rounded = False  # by `to`
        self._checked_prompts: set[str] = set()  # of which it was said whether they are cut
        for module in (*self._text_encoders.values(), self.unet, self.vae):
            module.requires_grad_(False).eval()
        _ = self.digest  # of the weights before they are rounded
        self.unet.to(self.device, self.dtype)
        for module in (self.unet, self.vae):  # made of convolutions
            module.to(memory_format=torch.channels_last)
        self._alphas_cumprod: torch.Tensor = self.scheduler.alphas_cumprod.to(self.device)  # (num_train_timesteps,)

    @property
    def family(self) -> str:
        """Return the class of its pipeline, by which `ldm.config.models` knows the settings of its kind of model."""
        return type(self.pipeline).__name__

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
    def num_train_timesteps(self) -> int:
        """Return the number of diffusion timesteps of training."""
        return self.scheduler.config.num_train_timesteps

    @property
    def _pooled_dim(self) -> int:
        """Return the size of XL's pooled embedding, which the U-Net takes beside the tokens; 0 where there is none."""
        encoder = self._text_encoders.get("text_encoder_2")
        return encoder.config.projection_dim if encoder is not None else 0

    @property
    def digest(self) -> str:
        """Return the digest of the base model: tokenizers, text encoders and U-Net as loaded, before any merge."""
        return self.digests[0]

    @cached_property
    def digests(self) -> tuple[str, str]:
        """Return `digest`, and what it was in version 1, which left the tokenizers out and counted buffers."""
        parameters: dict[str, torch.Tensor] = {}
        buffers: dict[str, torch.Tensor] = {}
        for module_name, module in {**self._text_encoders, "unet": self.unet}.items():
            own = {name for name, _ in module.named_buffers()}
            for name, value in module.state_dict().items():
                # only some versions of transformers put "text_model." before the name
                known = name if module_name == "unet" else name.removeprefix("text_model.")
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

    @torch.no_grad()
    def encode_prompt(self, prompts: list[str]) -> torch.Tensor:
        """Embed prompts: (N, rows, d) in float32, as `embedding_edit` leaves them.

        Each of the model's tokens has a row, and XL has one more: the pooled embedding, padded to d with zeros.
        """
        self.notify_of_cuts(prompts)
        if self.embedding_edit is None:
            return self.encode_with_states(prompts, {})[0]
        return self.embedding_edit(*self.encode_with_states(prompts, self.embedding_edit.layers))

    @torch.no_grad()
    def encode_with_states(
        self, prompts: list[str], layers: Mapping[str, Collection[int]]
    ) -> tuple[torch.Tensor, States]:
        """Return the unedited embeddings of prompts (N, rows, d), and hidden states: those after `layers`.

        A layer is a number from 0, or `LAST_STATE`: the encoder's columns of what the denoiser is given.
        """
        for encoder in self._text_encoders.values():
            if encoder.device != self.device:  # moving one that is there already takes a while too
                encoder.to(self.device)
        pipeline: Any = self.pipeline  # XL's says that it takes one prompt, and takes several
        captured: dict[str, dict[int, torch.Tensor]] = {}
        with ExitStack() as stack:
            for name, encoder in self._text_encoders.items():
                numbers = [number for number in layers.get(name, ()) if number != LAST_STATE]
                captured[name] = stack.enter_context(capture_states(encoder, numbers))
            outputs = pipeline.encode_prompt(
                prompts, device=self.device, num_images_per_prompt=1, do_classifier_free_guidance=False
            )
        token_embeds = outputs[0].float()  # (N, tokens, d)
        states = {(name, number): state.float() for name, found in captured.items() for number, state in found.items()}
        widths = [encoder.config.hidden_size for encoder in self._text_encoders.values()]
        for name, columns in zip(self._text_encoders, token_embeds.split(widths, dim=-1), strict=True):
            if LAST_STATE in layers.get(name, ()):
                states[name, LAST_STATE] = columns
        if not self._pooled_dim:
            return token_embeds, states
        pooled_row = F.pad(outputs[2].float(), (0, self.context_dim - self._pooled_dim))[:, None]  # (N, 1, d)
        return torch.cat([token_embeds, pooled_row], dim=1), states  # (N, tokens + 1, d)

    @property
    def text_encoders(self) -> dict[str, Any]:
        """Return the text encoders by name: `text_encoder`, and of XL `text_encoder_2` too."""
        return self._text_encoders

    @property
    def tokenizers(self) -> list[Any]:
        """Return the tokenizers, in the order of the text encoders."""
        return self._tokenizers

    def notify_of_cuts(self, prompts: Iterable[str]) -> None:
        """Say once of prompts that are longer than the model's tokens how many, which, and where each is cut."""
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._checked_prompts]
        if len(self._checked_prompts) > _MAX_CHECKED:
            self._checked_prompts.clear()
        self._checked_prompts.update(new)
        for line in describe_cuts(self._tokenizers, new):
            notify(line)

    def encode_uncond(self) -> torch.Tensor:
        """Embed the unconditional prompt, (1, rows, d): the empty one; for XL zeros, if its pipeline says so."""
        uncond_embeds = self.encode_prompt([""])
        if self.pipeline.config.get("force_zeros_for_empty_prompt"):
            return torch.zeros_like(uncond_embeds)
        return uncond_embeds

    def drop_pooled(self, prompt_embeds: torch.Tensor) -> torch.Tensor:
        """Return the rows of (..., rows, d) that cross-attention takes, (..., tokens, d): all but XL's pooled one."""
        return prompt_embeds[..., :-1, :] if self._pooled_dim else prompt_embeds

    def embed_prompts(self, prompts: Iterable[str]) -> dict[str, torch.Tensor]:
        """Return the embedding of each prompt that cross-attention takes, (tokens, d)."""
        prompts = list(prompts)
        self.notify_of_cuts(prompts)
        known = self.remembered if self.remembered is not None and self.embedding_edit is None else {}
        for prompt in prompts:
            if prompt not in known:
                known[prompt] = self.drop_pooled(self.encode_prompt([prompt]))[0]
        return {prompt: known[prompt] for prompt in prompts}

    @cached_property
    def vocab_gram(self) -> tuple[list[str], torch.Tensor]:
        """Return words of the tokenizer's vocabulary, and the mean of `e^T e` over them: (d, d), float64.

        The words are at most 512, evenly spaced in alphabetical order; e (tokens, d) is the embedding of one alone.
        """
        words = vocabulary_words(self.pipeline.tokenizer)
        words = words[:: max(1, -(-len(words) // _MAX_WORDS))]
        return words, self.prompt_gram(words) / max(1, len(words))

    def prompt_gram(self, prompts: Sequence[str]) -> torch.Tensor:
        """Return the sum of `e^T e` over prompts, (d, d), float64, with e (tokens, d) the embedding of one."""
        gram = torch.zeros(self.context_dim, self.context_dim, dtype=torch.float64)
        for start in range(0, len(prompts), _PROMPTS_AT_ONCE):
            embeds, _ = self.encode_with_states(list(prompts[start : start + _PROMPTS_AT_ONCE]), {})
            rows = self.drop_pooled(embeds).flatten(0, 1).cpu().double()  # (N * tokens, d)
            gram += rows.T @ rows
        return gram

    def vocab_gram_without(self, *spellings: str) -> torch.Tensor:
        """Return the mean of `vocab_gram` without the words, and pieces of words, of `spellings`: (d, d), float64."""
        words, mean = self.vocab_gram
        pieces = set()
        for text in spellings:
            pieces.update(piece.removesuffix("</w>") for piece in self.pipeline.tokenizer.tokenize(text))
        left_out = [word for word in words if word in pieces]
        if not left_out or len(left_out) == len(words):
            return mean
        return (mean * len(words) - self.prompt_gram(left_out)) / (len(words) - len(left_out))

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
