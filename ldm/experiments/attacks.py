"""What attacks share that know a model's weights: noised images of a concept, and how well a model denoises them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import torch

from ldm.config.settings import Settings
from ldm.diffusion.model import DiffusionModel
from ldm.io.files import stream_digest
from ldm.io.images import load_batch

_AT_ONCE = 64  # latents that the denoiser takes in one pass


@dataclass(frozen=True)
class NoisedImages:
    """Noised latents of images (N, ...) at timesteps (N,), and what a model should predict of them, (N, ...)."""

    latents: torch.Tensor
    timestep: torch.Tensor
    target: torch.Tensor

    @classmethod
    def sample(cls, model: DiffusionModel, images: torch.Tensor, number: int, seed: Sequence[int]) -> Self:
        """Return some of the clean latents `images` (P, ...), noised to timesteps that are spread over all of them.

        Which images, timesteps and noises they are depends on `seed` alone, and is the same on every device.
        """
        generator = torch.Generator().manual_seed(int(np.random.SeedSequence(tuple(seed)).generate_state(1)[0]))
        chosen = torch.randint(len(images), (number,), generator=generator)
        parts = (torch.arange(number) + torch.rand(number, generator=generator)) / number  # one in each of equal parts
        timestep = (parts * model.num_train_timesteps).long().to(model.device)
        noise = torch.randn((number, *images.shape[1:]), generator=generator).to(images)
        clean = images[chosen.to(images.device)]
        return cls(model.add_noise(clean, noise, timestep), timestep, model.denoising_target(clean, noise, timestep))


def attack_digest(config: Settings, seed: int, paths: Sequence[Path]) -> str:
    """Return what tells attacks apart by their settings, their seed and their images, for the names of folders."""
    made_from = [config.to_dict(), seed, [stream_digest(path) for path in paths]]
    return hashlib.sha256(json.dumps(made_from).encode()).hexdigest()[:8]


def encode_examples(model: DiffusionModel, paths: Sequence[Path]) -> torch.Tensor:
    """Return the latents (N, ...) of image files."""
    return model.encode_image(load_batch(paths, model.image_size))


def denoising_losses(model: DiffusionModel, noised: NoisedImages, embeds: torch.Tensor) -> torch.Tensor:
    """Return the mean squared error of what a model predicts of noised images, (P,), for prompts' rows (P, rows, d).

    It is what UnlearnDiffAtk (Zhang et al., arXiv 2310.11868) makes small: the smaller, the better a prompt says what
    the images show.
    """
    number = len(noised.latents)
    losses = []
    for part in embeds.split(max(1, _AT_ONCE // number)):
        latents, timestep = (torch.cat([each] * len(part)) for each in (noised.latents, noised.timestep))
        output = model.denoiser_output(latents, timestep, part.repeat_interleave(number, dim=0))
        errors = (output.unflatten(0, (len(part), number)) - noised.target) ** 2  # (P, N, ...)
        losses.append(errors.flatten(1).mean(dim=1))
    return torch.cat(losses)
