"""Images that are completed: from partial noise, or in a part of them, by the pipelines that diffusers has for it."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import AutoPipelineForImage2Image
from PIL import Image

from ldm.diffusion.model import DiffusionModel
from ldm.diffusion.pipeline_call import own_pipeline
from ldm.io.images import image_to_tensor, tensor_to_images


def find_completion(model: DiffusionModel) -> Any:
    """Return diffusers' pipeline that completes images by a model as it is now; None where its family has none."""
    try:
        pipe = AutoPipelineForImage2Image.from_pipe(own_pipeline(model))
    except (ValueError, TypeError):  # which it raises for a class that it does not know
        return None
    pipe.set_progress_bar_config(disable=True)
    return pipe


@torch.no_grad()
def complete(
    model: DiffusionModel,
    pipe: Any,
    images: Sequence[Image.Image],
    prompt: str,
    seeds: Sequence[int],
    num_inference_steps: int,
    guidance_scale: float,
    strength: float = 1.0,
    hidden: torch.Tensor | None = None,
) -> list[Image.Image]:
    """Return images completed under a prompt, by `find_completion`'s pipeline.

    The images are given noise up to the timestep of `strength`, a fraction of all, and denoised from there (SDEdit,
    Meng et al., arXiv 2108.01073). Where `hidden` (h, w), of latents, is 1 they are generated anew, and elsewhere led
    back to what they were after each step (RePaint, Lugmayr et al., arXiv 2201.09865).
    """
    rows, uncond = model.encode_prompt([prompt]), model.encode_uncond()
    prompts = model.split(rows.expand(len(images), -1, -1).to(model.device, model.dtype))
    negative = model.split(uncond.expand(len(images), -1, -1).to(model.device, model.dtype))
    guides = model.adapter.guides(pipe) and guidance_scale > 1
    side, accepted = model.image_size, inspect.signature(pipe.__call__).parameters
    options: dict[str, Any] = {**model.adapter.call_options, "height": side, "width": side}
    pixels = torch.stack([image_to_tensor(image) for image in images])  # (N, 3, H, W) in [-1, 1]
    if hidden is not None:
        pixels, options["callback_on_step_end"] = _hide(model, pixels, hidden, seeds)
    given = model.adapter.call_inputs(prompts, negative if guides else None)
    decoded = pipe(
        **{name: value for name, value in given.items() if name in accepted},
        **{name: value for name, value in options.items() if name in accepted},
        image=(pixels + 1) / 2,
        strength=strength,
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        output_type="pt",
    ).images
    return tensor_to_images(decoded.float() * 2 - 1)


def _hide(model: DiffusionModel, pixels: torch.Tensor, hidden: torch.Tensor, seeds: Sequence[int]) -> Any:
    """Return images (N, 3, H, W) that are grey where `hidden`, and what leads latents back to them elsewhere."""
    scale = pixels.shape[-1] // hidden.shape[-1]
    is_hidden = hidden.repeat_interleave(scale, 0).repeat_interleave(scale, 1).bool()  # (H, W)
    grey = pixels.masked_fill(is_hidden, 0.0)
    known = model.encode_image(grey).float()  # (N, ...)
    noise = torch.stack([torch.randn(known.shape[1:], generator=torch.Generator().manual_seed(s)) for s in seeds])
    shape = (-1, 1) if known.dim() == 3 else hidden.shape  # of packed latents a row is a place
    mask = hidden.reshape(shape).to(known)

    def lead_back(pipe: Any, step: int, timestep: Any, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        scheduler, latents = pipe.scheduler, tensors["latents"]
        left = scheduler.timesteps[scheduler.timesteps < timestep]
        wanted = known
        if len(left) and model.adapter.is_flow:
            wanted = scheduler.scale_noise(known, left[:1], noise.to(known))
        elif len(left):
            wanted = scheduler.add_noise(known, noise.to(known), left[:1])
        return {"latents": (mask * latents + (1 - mask) * wanted).to(latents.dtype)}

    return grey, lead_back
