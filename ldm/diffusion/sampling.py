"""Generate images: noise from a seed, and the sampler's loop."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from ldm.config.methods import SamplingConfig
from ldm.diffusion.model import DiffusionModel
from ldm.diffusion.pipeline_call import call_pipeline, seeded_generators, trajectory_by_call
from ldm.io.images import tensor_to_images
from ldm.io.prompts import PromptCase

_MAX_LATENTS = 64  # that the U-Net takes in one pass: with more, what its layers hand on leaves a CPU's caches


def initial_noise(model: DiffusionModel, seed: int, num_images: int) -> torch.Tensor:
    """Return the noise that the first `num_images` images of a seed start from, (num_images, C, h, w), on the CPU.

    It is the same on every device.
    """
    return torch.randn((num_images, *model.latent_shape), generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class SeededNoise:
    """What images are generated from: their `initial` noise (N, C, h, w), and what a sampler's own noise comes from.

    `generators` has one for each image, or one for all.
    """

    initial: torch.Tensor
    generators: list[torch.Generator]

    @classmethod
    def sample(cls, model: DiffusionModel, images: Sequence[tuple[int, int]]) -> Self:
        """Return that of images, each the n-th of a seed: (seed, n). It is the same on every device."""
        if model.adapter.samples_by_call:
            return cls(torch.zeros(len(images), *model.latent_shape), seeded_generators(images))
        initial = torch.stack([initial_noise(model, seed, n + 1)[n] for seed, n in images])
        return cls(initial, [_later_generator(model, seed, n) for seed, n in images])


def _later_generator(model: DiffusionModel, seed: int, n: int) -> torch.Generator:
    """Return what samples the noise that a sampler adds on the way to the n-th image of a seed.

    For the first image it goes on where its initial noise ended, as a pipeline's generator does.
    """
    if n:
        return torch.Generator().manual_seed(int(np.random.SeedSequence((seed, n)).generate_state(1)[0]))
    generator = torch.Generator().manual_seed(seed)
    torch.randn((1, *model.latent_shape), generator=generator)
    return generator


def make_scheduler(model: DiffusionModel, num_inference_steps: int) -> Any:
    """Return a new scheduler of the model's own kind, set to `num_inference_steps`."""
    scheduler = type(model.scheduler).from_config(model.scheduler.config)
    scheduler.set_timesteps(num_inference_steps, device=model.device)
    return scheduler


def try_scheduler(model: DiffusionModel, num_inference_steps: int) -> bool:
    """Return whether the model's scheduler adds noise on the way from noise to an image.

    Raises ValueError when it cannot take that many steps.
    """
    most = model.num_train_timesteps
    if num_inference_steps > most:
        raise ValueError(
            f"`num_inference_steps` {num_inference_steps}: the model has {most} timesteps, which is the most"
        )
    if model.adapter.samples_by_call:
        return False
    generator = torch.Generator().manual_seed(0)
    before = generator.get_state()
    latents = torch.zeros(1, *model.latent_shape, device=model.device)
    try:
        scheduler = make_scheduler(model, num_inference_steps)
        for timestep in scheduler.timesteps:
            latents = _step(scheduler, torch.zeros_like(latents), timestep, latents, [generator])
    except UnseededNoiseError:
        raise
    except (
        Exception
    ) as error:  # of any kind: what a scheduler's own arithmetic says to numbers that it was not made for
        name = type(model.scheduler).__name__
        raise ValueError(
            f"the model's scheduler {name} cannot take {num_inference_steps} steps: choose another number of "
            f"`num_inference_steps`: {error}"
        ) from error
    return not torch.equal(before, generator.get_state())


class UnseededNoiseError(ValueError):
    """Say that a scheduler adds noise that comes from no case's seed."""


@torch.no_grad()
def sample_trajectory(
    model: DiffusionModel,
    noise: SeededNoise,
    prompt_embeds: torch.Tensor,
    uncond_embeds: torch.Tensor,
    num_inference_steps: int,
    guidance_scale: float,
) -> Iterator[torch.Tensor]:
    """Yield the latents (N, C, h, w) after each timestep of the model's own scheduler, from noise to clean.

    Of a model that samples by its pipeline's own call they are those after each of the pipeline's steps.

    `prompt_embeds` are (N, rows, d), `uncond_embeds` are (1, rows, d). The guided noise is
    `eps("") + guidance_scale (eps(c) - eps(""))` (Ho and Salimans, arXiv 2207.12598).
    Raises ValueError for a scheduler that takes noise from elsewhere than `noise`.
    """
    if model.adapter.samples_by_call:
        arguments = prompt_embeds, uncond_embeds, num_inference_steps, guidance_scale
        yield from trajectory_by_call(model, noise.generators, *arguments)
        return
    scheduler = make_scheduler(model, num_inference_steps)
    latents = noise.initial.to(model.device) * scheduler.init_noise_sigma
    cfg_embeds = torch.cat([uncond_embeds.expand_as(prompt_embeds), prompt_embeds])  # (2N, rows, d)
    for timestep in scheduler.timesteps:
        cfg_latents = scheduler.scale_model_input(torch.cat([latents, latents]), timestep)  # (2N, C, h, w)
        batches = zip(cfg_latents.split(_MAX_LATENTS), cfg_embeds.split(_MAX_LATENTS), strict=True)
        outputs = torch.cat([model.denoiser_output(batch, timestep, embeds) for batch, embeds in batches])
        unconditional, conditional = outputs.chunk(2)  # (N, C, h, w) each
        guided = unconditional + guidance_scale * (conditional - unconditional)
        latents = _step(scheduler, guided, timestep, latents, noise.generators)
        yield latents


def _step(
    scheduler: Any,
    output: torch.Tensor,
    timestep: torch.Tensor,
    latents: torch.Tensor,
    generators: list[torch.Generator],
) -> torch.Tensor:
    """Return the latents after one step of the scheduler, whose noise comes from `generators` alone."""
    if "generator" in inspect.signature(scheduler.step).parameters:
        return scheduler.step(output, timestep, latents, generator=generators).prev_sample
    before = _global_random_state(latents.device)
    stepped = scheduler.step(output, timestep, latents).prev_sample
    if not torch.equal(before, _global_random_state(latents.device)):
        raise UnseededNoiseError(
            f"the model's scheduler {type(scheduler).__name__} adds noise that no seed decides: give the model "
            "another one in scheduler/scheduler_config.json, such as DPMSolverMultistepScheduler"
        )
    return stepped


def _global_random_state(device: torch.device) -> torch.Tensor:
    own = torch.get_device_module(device)  # that of the CPU has no state of its own
    states = [own.get_rng_state(device)] if hasattr(own, "get_rng_state") else []
    return torch.cat([torch.get_rng_state(), *states])


def sample_latents(
    model: DiffusionModel,
    noise: SeededNoise,
    prompt_embeds: torch.Tensor,
    uncond_embeds: torch.Tensor,
    num_inference_steps: int,
    guidance_scale: float,
    stop: int | None = None,
) -> torch.Tensor:
    """Return the last latents of `sample_trajectory`, (N, C, h, w), or those after its first `stop` timesteps."""
    latents = noise.initial
    if not model.adapter.samples_by_call:
        latents = latents * make_scheduler(model, num_inference_steps).init_noise_sigma
    trajectory = sample_trajectory(model, noise, prompt_embeds, uncond_embeds, num_inference_steps, guidance_scale)
    for next_latents in itertools.islice(trajectory, stop):
        latents = next_latents
    return latents


@contextmanager
def compiled_unet(model: DiffusionModel, batch_size: int) -> Iterator[None]:
    """Run the U-Net by torch.compile, for `batch_size` images at a time, while the block runs.

    It is faster, after minutes of compiling whose result torch keeps for the next time, and the last bits are others.
    Raises ValueError where this machine cannot compile.
    """
    from torch._dynamo.exc import BackendCompilerFailed  # which takes seconds to import

    unet, uncond_embeds = model.denoiser, model.encode_uncond()
    model.denoiser = torch.compile(unet, dynamic=False)
    print(f"compiling the U-Net for {batch_size} images at a time", flush=True)
    try:
        noise = SeededNoise(torch.zeros(batch_size, *model.latent_shape), [torch.Generator()])
        sample_latents(model, noise, uncond_embeds.expand(batch_size, -1, -1), uncond_embeds, 1, 1.0)
        with torch.compiler.set_stance("eager_on_recompile"):
            yield
    except BackendCompilerFailed as error:
        raise ValueError(
            "torch.compile does not work on this machine: leave `compile` out, or see to what it says: "
            f"{error.inner_exception}"
        ) from error
    finally:
        model.denoiser = unet


def generate(
    model: DiffusionModel, requests: Sequence[tuple[PromptCase, int]], sampling: SamplingConfig
) -> Iterator[tuple[PromptCase, int, Image.Image]]:
    """Generate the requested (case, n) pairs, `sample_batch_size` at a time: the n-th image of each case's seed.

    An image depends on its case and n alone. Raises ValueError, naming it, for one that holds NaN or infinity.
    """
    try_scheduler(model, sampling.num_inference_steps)
    uncond_embeds = model.encode_uncond()
    prompts = list(dict.fromkeys(case.prompt for case, _ in requests))
    model.notify_of_cuts(prompts)
    embeds = {prompt: model.encode_prompt([prompt])[0] for prompt in prompts}  # (rows, d) each
    with tqdm(total=len(requests), desc="images", unit="image") as bar:
        for batch in batches_of(requests, sampling.sample_batch_size):
            noise = SeededNoise.sample(model, [(case.seed, n) for case, n in batch])
            prompt_embeds = torch.stack([embeds[case.prompt] for case, _ in batch])  # (N, rows, d)
            arguments = prompt_embeds, uncond_embeds, sampling.num_inference_steps, sampling.guidance_scale
            if model.adapter.samples_by_call:
                decoded = call_pipeline(model, noise.generators, *arguments)
            else:
                decoded = model.decode(sample_latents(model, noise, *arguments))
            for (case, _), image in zip(batch, decoded, strict=True):
                if not image.isfinite().all():
                    raise ValueError(f"the image of case {case.case_number}, '{case.prompt}', {_not_finite(model)}")
            for (case, n), image in zip(batch, tensor_to_images(decoded), strict=True):
                yield case, n, image
            bar.update(len(batch))


def _not_finite(model: DiffusionModel) -> str:
    """Say that an image holds NaN or infinity, and what to do about it."""
    if model.dtype == torch.float16:
        return "holds NaN or infinity in float16: choose `unet_dtype` bfloat16 or float32"
    return "holds NaN or infinity: choose a smaller `guidance_scale`, or leave out a shift that is too large"


def batches_of(requests: Sequence[tuple[PromptCase, int]], batch_size: int) -> list[Sequence[tuple[PromptCase, int]]]:
    """Return the requests in groups of `batch_size`, the last with what is left."""
    return [requests[start : start + batch_size] for start in range(0, len(requests), batch_size)]
