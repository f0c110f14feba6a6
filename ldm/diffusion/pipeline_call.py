"""Images by a pipeline's own call, with its own scheduler and latents, of all families but Stable Diffusion 1 to XL."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
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


def call_pipeline(
    model: DiffusionModel,
    generators: Sequence[torch.Generator],
    prompt_embeds: torch.Tensor,
    uncond_embeds: torch.Tensor,
    num_inference_steps: int,
    guidance_scale: float,
    output_type: str = "pt",
) -> torch.Tensor:
    """Return what a model's pipeline makes of prompts (N, T + 1, d + p): images (N, 3, H, W) in [-1, 1], or latents.

    `output_type` is pt or latent. `uncond_embeds` (1, T + 1, d + p) guide where a pipeline guides by negative prompts.
    """
    pipe = _without_text(model)
    prompts = model.split(prompt_embeds.to(model.device, model.dtype))
    negative = model.split(uncond_embeds.to(model.device, model.dtype).expand_as(prompt_embeds))
    given = model.adapter.call_inputs(prompts, negative if model.adapter.guides(pipe) and guidance_scale > 1 else None)
    side = model.image_size
    output = pipe(
        **given,
        **model.adapter.call_options,
        height=side,
        width=side,
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        generator=list(generators),
        output_type=output_type,
    ).images
    return output if output_type == "latent" else output.float() * 2 - 1


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

    The other arguments are those of `call_pipeline`.
    """
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
        call_pipeline(model, generators, prompt_embeds, uncond_embeds, num_inference_steps, guidance_scale, "latent")
    except _StoppedError as stopped:
        return stopped.latents, model.pipeline.scheduler.timesteps[stop]
    finally:
        hook.remove()
    raise ValueError(f"the pipeline of {model.name} ends before step {stop} of {num_inference_steps}")


def _without_text(model: DiffusionModel) -> Any:
    """Return the model's pipeline with its denoiser as it is now, and without text encoders, whose work is done."""
    model.vae.to(model.device)
    pipe = copy(model.pipeline)
    for source in model.sources:
        setattr(pipe, source.name, None)
    setattr(pipe, model.adapter.denoiser, model.denoiser)
    pipe.set_progress_bar_config(disable=True)
    return pipe
