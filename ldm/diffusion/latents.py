"""TODO diffusion.latents."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
import torch
from ldm.diffusion.model import DiffusionModel
from ldm.diffusion.sampling import make_scheduler, sample_latents
from ldm.io.images import list_images, load_batch


MAX_IMAGES = 256  # images of a folder; more would only take longer to encode


def latents_from_folder(model: DiffusionModel, folder: Path, batch: int, seed: int,
                hint: str = "") -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Noisy latents of the first `MOST` images in `folder`, encoded once: z_t (batch, C, h, w), t (batch,).

    Images, steps and noise are drawn uniformly from `seed`. Raises ValueError for a missing or empty folder (`hint`
    says what makes it) or an unreadable image.
    """
    paths = list_images(folder, hint)[:MAX_IMAGES]
    latents = torch.cat([model.encode_image(load_batch(paths[k:k + 16], model.image_size))
                         for k in range(0, len(paths), 16)])
    return noised_batches(model, latents, batch, seed)


def noised_batches(model: DiffusionModel, latents: torch.Tensor, batch: int,
          seed: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Endless batches of clean `latents` (N, C, h, w) at random steps, the same on every device for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        chosen = torch.randint(len(latents), (batch,), generator=generator)
        step = torch.randint(model.steps, (batch,), generator=generator).to(model.device)
        noise = torch.randn((batch, *latents.shape[1:]), generator=generator).to(latents)
        yield model.add_noise(latents[chosen.to(latents.device)], noise, step), step


def sampled_batches(model: DiffusionModel, embedding: torch.Tensor, batch: int, steps: int, guidance: float, seed: int,
            scope: Callable[[], AbstractContextManager]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Endless batches that the model draws under one prompt (1, tokens, d), stopped before a random one of `steps` steps.

    `scope()` is entered while it draws, so that a student's weights can be the ones that draw. Noise and steps come from
    `seed`, the same on every device.
    """
    return _sampled(model, embedding, model.encode_uncond(), batch, steps, guidance, seed, scope)


def _sampled(model: DiffusionModel, embedding: torch.Tensor, blank: torch.Tensor, batch: int, steps: int, guidance: float, seed: int,
           scope: Callable[[], AbstractContextManager]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    timesteps = make_scheduler(model, steps).timesteps
    while True:
        stop = int(torch.randint(len(timesteps), (), generator=generator))
        noise = torch.randn((batch, *model.latent_shape), generator=generator)
        with scope():
            latents = sample_latents(model, noise, embedding.expand(batch, -1, -1), blank, steps, guidance, stop)
        yield make_scheduler(model, steps).scale_model_input(latents, timesteps[stop]), timesteps[stop].expand(batch)
