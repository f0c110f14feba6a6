"""Images by a pipeline's own call, with its own scheduler and latents, of all families but Stable Diffusion 1 to XL."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from queue import SimpleQueue
from typing import Any

import numpy as np
import torch

from ldm.diffusion.model import DiffusionModel


class _StoppedError(Exception):
    """End a call of a pipeline, with what its denoiser was given."""

    def __init__(self, latents: torch.Tensor):
        super().__init__()
        self.latents = latents


def seeded_generators(images: Sequence[tuple[int, int]]) -> list[torch.Generator]:
    """Return what the noise of images comes from, each the n-th of a seed: (seed, n). The first is a pipeline's own."""
    seeds = [seed if not n else int(np.random.SeedSequence((seed, n)).generate_state(1)[0]) for seed, n in images]
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def call_pipeline(model: DiffusionModel, *arguments: Any) -> torch.Tensor:
    """Return the images (N, 3, H, W) in [-1, 1] that a model's pipeline makes of prompts.

    The further arguments are those of `_call`.
    """
    return _call(own_pipeline(model), model, *arguments, output_type="pt").float() * 2 - 1


def trajectory_by_call(model: DiffusionModel, *arguments: Any) -> Iterator[torch.Tensor]:
    """Yield the latents (N, ...) after each step of a model's pipeline; the further arguments are those of `_call`.

    The pipeline runs in a thread of its own. It ends at its next step once no more latents are asked for.
    """
    steps: SimpleQueue[torch.Tensor | None] = SimpleQueue()
    is_left = threading.Event()

    def keep(latents: torch.Tensor) -> None:
        if is_left.is_set():
            raise _StoppedError(latents)
        steps.put(latents)

    options = {"output_type": "latent", **model.adapter.step_callback(keep)}
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(_call, own_pipeline(model), model, *arguments, **options)
        call.add_done_callback(lambda _: steps.put(None))
        try:
            yield from iter(steps.get, None)
            call.result()  # which raises what the pipeline did
        finally:
            is_left.set()


def _call(
    pipe: Any,
    model: DiffusionModel,
    generators: Sequence[torch.Generator],
    prompt_embeds: torch.Tensor,
    uncond_embeds: torch.Tensor,
    num_inference_steps: int,
    guidance_scale: float,
    **options: Any,
) -> torch.Tensor:
    """Return what a pipeline's own call makes of prompts (N, T + 1, d + p) with these options of it.

    `uncond_embeds` (1, T + 1, d + p) guide where a pipeline guides by negative prompts.
    """
    prompts = model.split(prompt_embeds.to(model.device, model.dtype))
    negative = model.split(uncond_embeds.to(model.device, model.dtype).expand_as(prompt_embeds))
    given = model.adapter.call_inputs(prompts, negative if model.adapter.guides(pipe) and guidance_scale > 1 else None)
    side = model.image_size
    return pipe(
        **given,
        **model.adapter.call_options,
        height=side,
        width=side,
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        generator=list(generators),
        **options,
    ).images


def latents_at(
    model: DiffusionModel,
    generators: Sequence[torch.Generator],
    prompt_embeds: torch.Tensor,
    uncond_embeds: torch.Tensor,
    num_inference_steps: int,
    guidance_scale: float,
    stop: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the latents (N, ...) that a pipeline's denoiser is given after `stop` steps, and their timestep ().

    The other arguments are those of `_call`.
    """
    pipe = own_pipeline(model)
    calls: list[float] = []  # the timesteps that the denoiser was called at

    def watch(_: Any, args: Any, kwargs: Any) -> None:
        timestep = kwargs["timestep"].flatten()[0].item()
        if not calls or calls[-1] != timestep:
            calls.append(timestep)
        if len(calls) > stop:
            latents = args[0] if args else kwargs["hidden_states"]
            raise _StoppedError(latents[-len(prompt_embeds) :].float())

    hook = model.denoiser.register_forward_pre_hook(watch, with_kwargs=True)
    try:
        arguments = generators, prompt_embeds, uncond_embeds, num_inference_steps, guidance_scale
        _call(pipe, model, *arguments, output_type="latent")
    except _StoppedError as stopped:
        return stopped.latents, pipe.scheduler.timesteps[stop]
    finally:
        hook.remove()
    raise ValueError(f"the pipeline of {model.name} ends before step {stop} of {num_inference_steps}")


def own_pipeline(model: DiffusionModel) -> Any:
    """Return the model's pipeline for one call: its denoiser as it is now, and a scheduler that no other call steps.

    It has no text encoders, whose work is done.
    """
    model.vae.to(model.device)
    pipe = copy(model.pipeline)
    for source in model.sources:
        setattr(pipe, source.name, None)
    setattr(pipe, model.adapter.denoiser, model.denoiser)
    pipe.scheduler = type(model.scheduler).from_config(model.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    return pipe
