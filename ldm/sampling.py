"""Seeded, batched generation with classifier-free guidance, in memory or into a folder that can be resumed."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

from ldm.images import Case, image_name, save_image, to_images, write_cases, write_json
from ldm.model import TextToImage


def first_noise(model: TextToImage, seed: int, samples: int) -> torch.Tensor:
    """The noise that `seed` starts its `samples` images from, (samples, C, h, w), the same on every device."""
    return torch.randn((samples, *model.latent_shape), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def denoise(model: TextToImage, noise: torch.Tensor, embedding: torch.Tensor, blank: torch.Tensor, steps: int,
            guidance: float) -> torch.Tensor:
    """From noise (N, C, h, w) to clean latents under prompts `embedding` (N, tokens, d), by the model's own scheduler.

    The guided noise is `eps("") + guidance (eps(c) - eps(""))` (Ho and Salimans, arXiv 2207.12598).
    """
    scheduler = type(model.scheduler).from_config(model.scheduler.config)
    scheduler.set_timesteps(steps, device=model.device)
    latents = noise.to(model.device, model.dtype) * scheduler.init_noise_sigma
    both = torch.cat([blank.expand_as(embedding), embedding])  # (2N, tokens, d)
    for step in scheduler.timesteps:
        doubled = scheduler.scale_model_input(torch.cat([latents, latents]), step)
        unconditional, conditional = model.predict_noise(doubled, step, both).chunk(2)
        noise = unconditional + guidance * (conditional - unconditional)
        latents = scheduler.step(noise, step, latents).prev_sample
    return latents


def generate(model: TextToImage, cases: Sequence[Case], samples: int, steps: int, guidance: float, batch: int,
             wanted: Sequence[tuple[Case, int]] | None = None) -> Iterator[tuple[Case, int, Image.Image]]:
    """Draw `samples` images for each case, `batch` at a time; `wanted` picks some (case, sample) pairs of them."""
    pairs = list(wanted) if wanted is not None else [(case, n) for case in cases for n in range(samples)]
    blank = model.encode_prompt([""])
    prompts = list(dict.fromkeys(case.prompt for case, _ in pairs))
    known = {prompt: model.encode_prompt([prompt])[0] for prompt in prompts}
    with tqdm(total=len(pairs), desc="images", unit="image") as bar:
        for start in range(0, len(pairs), batch):
            part = pairs[start:start + batch]
            noise = torch.stack([first_noise(model, case.seed, samples)[n] for case, n in part])
            embedding = torch.stack([known[case.prompt] for case, _ in part])
            images = to_images(model.decode(denoise(model, noise, embedding, blank, steps, guidance)))
            for (case, n), image in zip(part, images):
                yield case, n, image
            bar.update(len(part))


def generate_folder(model: TextToImage, cases: Sequence[Case], folder: Path, recipe: dict, samples: int, steps: int,
                    guidance: float, batch: int) -> int:
    """Draw every image of `cases` that `folder` lacks; returns how many were drawn.

    The folder gets `prompts.csv` and `recipe.json` too. Raises ValueError when it holds the images of another recipe.
    """
    check_recipe(folder, recipe)
    there = {path.name for path in folder.rglob("*.png")}  # sorted into class folders or not
    missing = [(case, n) for case in cases for n in range(samples) if image_name(case.number, n) not in there]
    write_cases(folder / "prompts.csv", cases)
    write_json(folder / "recipe.json", recipe)
    for case, n, image in generate(model, cases, samples, steps, guidance, batch, wanted=missing):
        save_image(folder / image_name(case.number, n), image)
    return len(missing)


def check_recipe(folder: Path, recipe: dict) -> None:
    """Raises ValueError when `folder` holds images that another recipe made."""
    path = folder / "recipe.json"
    if path.exists() and json.loads(path.read_text()) != json.loads(json.dumps(recipe)):
        raise ValueError(f"{folder} holds images of another run (see {path.name} there): "
                         "choose another --save_path, or remove the folder")
