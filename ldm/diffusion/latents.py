"""Latents to train on: noised latents of images, or what the model itself samples."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch

from ldm.config.methods import SelfSampledConfig
from ldm.diffusion.model import DiffusionModel
from ldm.diffusion.pipeline_call import latents_at
from ldm.diffusion.sampling import SeededNoise, make_scheduler, sample_latents
from ldm.io.images import list_images, load_batch

MAX_IMAGES = 256  # of a folder; more would only take longer to encode
_IMAGES_AT_ONCE = 16  # that are read and encoded together


def latents_from_folder(
    model: DiffusionModel, folder: Path, batch_size: int, seed: int, **details: object
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Return endless batches of noised latents of the first `MAX_IMAGES` images in `folder`, which are encoded once.

    A batch is z_t (batch_size, C, h, w) and t (batch_size,). Images, timesteps and noise depend on `seed` alone.
    Raises MissingFileError of kind "training images", with `details`, for a missing or empty folder, and ValueError for
    an unreadable image.
    """
    paths = list_images(folder, "training images", **details)[:MAX_IMAGES]
    batches = [paths[start : start + _IMAGES_AT_ONCE] for start in range(0, len(paths), _IMAGES_AT_ONCE)]
    latents = [model.encode_image(load_batch(batch, model.image_size)) for batch in batches]
    return noised_batches(model, torch.cat(latents), batch_size, seed)


def noised_batches(
    model: DiffusionModel, latents: torch.Tensor, batch_size: int, seed: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield what `denoising_batches` does without the target: z_t (batch_size, C, h, w) and t (batch_size,)."""
    for noised, timesteps, _ in denoising_batches(model, latents, batch_size, seed):
        yield noised, timesteps


def denoising_batches(
    model: DiffusionModel, latents: torch.Tensor, batch_size: int, seed: int, first: int = 0
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Yield endless batches of clean `latents` (N, C, h, w), noised to random timesteps, of which `first` is the least.

    A batch is z_t (batch_size, C, h, w), t (batch_size,), and what the denoiser was trained to predict of them, as z_t;
    the same on every device for the same seed.
    """
    generator = torch.Generator().manual_seed(seed)
    while True:
        indices = torch.randint(len(latents), (batch_size,), generator=generator)
        timesteps = torch.randint(first, model.num_train_timesteps, (batch_size,), generator=generator).to(model.device)
        noise = torch.randn((batch_size, *latents.shape[1:]), generator=generator).to(latents)
        clean = latents[indices.to(latents.device)]
        yield model.add_noise(clean, noise, timesteps), timesteps, model.denoising_target(clean, noise, timesteps)


def sampled_batches(
    model: DiffusionModel,
    prompt_embeds: torch.Tensor,
    config: SelfSampledConfig,
    scope: Callable[[], AbstractContextManager[Any]],
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Return endless batches that the model samples under one prompt (1, rows, d), stopped before a random timestep.

    A batch is z_t (batch_size, C, h, w) and t (batch_size,), the same t for all. `scope()` is entered while the model
    samples, so that the weights that are being trained can be the ones that sample. Noise and timesteps depend on the
    config's seed alone, and are the same on every device.
    """
    uncond_embeds = model.encode_uncond()  # now, since the text encoder may leave the device before the first batch
    return _sample_batches(model, prompt_embeds, uncond_embeds, config, scope)


def _sample_batches(
    model: DiffusionModel,
    prompt_embeds: torch.Tensor,
    uncond_embeds: torch.Tensor,
    config: SelfSampledConfig,
    scope: Callable[[], AbstractContextManager[Any]],
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    batch_size, num_inference_steps = config.train_batch_size, config.num_inference_steps
    generator = torch.Generator().manual_seed(config.seed)
    if model.adapter.samples_by_call:
        batch_embeds = prompt_embeds.expand(batch_size, -1, -1)
        while True:
            stop = int(torch.randint(num_inference_steps, (), generator=generator))
            generators = [generator] * batch_size
            embeds = batch_embeds, uncond_embeds
            with scope():
                arguments = num_inference_steps, config.start_guidance, stop
                latents, timestep = latents_at(model, generators, *embeds, *arguments)
            yield latents, timestep.expand(batch_size).to(latents.device)
    timesteps = make_scheduler(model, num_inference_steps).timesteps
    batch_embeds = prompt_embeds.expand(batch_size, -1, -1)  # (batch_size, rows, d)
    while True:
        stop = int(torch.randint(len(timesteps), (), generator=generator))
        noise = SeededNoise(torch.randn((batch_size, *model.latent_shape), generator=generator), [generator])
        with scope():
            latents = sample_latents(
                model, noise, batch_embeds, uncond_embeds, num_inference_steps, config.start_guidance, stop
            )
        scheduler = make_scheduler(model, num_inference_steps)
        yield scheduler.scale_model_input(latents, timesteps[stop]), timesteps[stop].expand(batch_size)
