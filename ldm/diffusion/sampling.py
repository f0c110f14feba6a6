"""Generate images: noise from a seed, the sampler's loop, and folders of images that a stopped run resumes."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from ldm.config.methods import SamplingConfig
from ldm.diffusion.model import DiffusionModel
from ldm.io.files import METADATA_FILE, check_metadata, find_metadata_file, write_json
from ldm.io.images import find_images, image_filename, is_intact, save_image, tensor_to_images
from ldm.io.prompts import PromptCase, merge_prompt_csv, write_prompt_csv
from ldm.io.sharding import Shard

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


def adds_noise(model: DiffusionModel) -> bool:
    """Return whether the model's scheduler adds noise on the way from noise to an image."""
    generator = torch.Generator().manual_seed(0)
    before, scheduler = generator.get_state(), make_scheduler(model, 4)
    latents = torch.zeros(1, *model.latent_shape, device=model.device)
    for timestep in scheduler.timesteps:
        latents = _step(scheduler, torch.zeros_like(latents), timestep, latents, [generator])
    return not torch.equal(before, generator.get_state())


def make_scheduler(model: DiffusionModel, num_inference_steps: int) -> Any:
    """Return a new scheduler of the model's own kind, set to `num_inference_steps`."""
    scheduler = type(model.scheduler).from_config(model.scheduler.config)
    scheduler.set_timesteps(num_inference_steps, device=model.device)
    return scheduler


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

    `prompt_embeds` are (N, rows, d), `uncond_embeds` are (1, rows, d). The guided noise is
    `eps("") + guidance_scale (eps(c) - eps(""))` (Ho and Salimans, arXiv 2207.12598).
    Raises ValueError for a scheduler that takes noise from elsewhere than `noise`.
    """
    scheduler = make_scheduler(model, num_inference_steps)
    latents = noise.initial.to(model.device) * scheduler.init_noise_sigma
    cfg_embeds = torch.cat([uncond_embeds.expand_as(prompt_embeds), prompt_embeds])  # (2N, rows, d)
    for timestep in scheduler.timesteps:
        cfg_latents = scheduler.scale_model_input(torch.cat([latents, latents]), timestep)  # (2N, C, h, w)
        batches = zip(cfg_latents.split(_MAX_LATENTS), cfg_embeds.split(_MAX_LATENTS), strict=True)
        outputs = torch.cat([model.unet_output(batch, timestep, embeds) for batch, embeds in batches])
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
        raise ValueError(
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
    latents = noise.initial * make_scheduler(model, num_inference_steps).init_noise_sigma
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

    unet, uncond_embeds = model.unet, model.encode_uncond()
    model.unet = torch.compile(unet, dynamic=False)
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
        model.unet = unet


def generate(
    model: DiffusionModel, requests: Sequence[tuple[PromptCase, int]], sampling: SamplingConfig
) -> Iterator[tuple[PromptCase, int, Image.Image]]:
    """Generate the requested (case, n) pairs, `sample_batch_size` at a time: the n-th image of each case's seed.

    An image depends on its case and n alone. Raises ValueError, naming it, for one that holds NaN or infinity.
    """
    uncond_embeds = model.encode_uncond()
    prompts = list(dict.fromkeys(case.prompt for case, _ in requests))
    model.notify_of_cuts(prompts)
    embeds = {prompt: model.encode_prompt([prompt])[0] for prompt in prompts}  # (rows, d) each
    with tqdm(total=len(requests), desc="images", unit="image") as bar:
        for batch in _batches(requests, sampling.sample_batch_size):
            noise = SeededNoise.sample(model, [(case.seed, n) for case, n in batch])
            prompt_embeds = torch.stack([embeds[case.prompt] for case, _ in batch])  # (N, rows, d)
            latents = sample_latents(
                model, noise, prompt_embeds, uncond_embeds, sampling.num_inference_steps, sampling.guidance_scale
            )
            decoded = model.decode(latents)
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
    return "holds NaN or infinity: choose a smaller `guidance_scale`, or get the model again"


def _batches(requests: Sequence[tuple[PromptCase, int]], batch_size: int) -> list[Sequence[tuple[PromptCase, int]]]:
    return [requests[start : start + batch_size] for start in range(0, len(requests), batch_size)]


def generate_to_folder(
    model: DiffusionModel,
    cases: Sequence[PromptCase],
    folder: Path,
    metadata: Mapping[str, Any],
    sampling: SamplingConfig,
    images_per_seed: int = 1,
    shard: Shard = Shard(),
    compile_unet: bool = False,
) -> int:
    """Generate the images of `cases` that `folder` lacks, `images_per_seed` each, and return how many were generated.

    Which images are generated together is the same in every run, and of several processes each generates its `shard`
    of these batches: so the files are the same to the last bit, however often a run was stopped, and however many
    processes there are. The folder gets `prompts.csv` too, and `metadata.json` with `metadata` and the sampling
    settings. With `compile_unet` the U-Net runs by torch.compile (`compiled_unet`), whose last bits are others.
    Raises ValueError when the folder holds images of other metadata, or of another prompt or seed under a case number.
    """
    metadata = {
        **metadata,
        "num_inference_steps": sampling.num_inference_steps,
        "guidance_scale": sampling.guidance_scale,
    }
    if compile_unet:
        metadata["compiled"] = True
    if adds_noise(model):
        metadata["added_noise"] = "by seed"  # which older versions did not do
    check_metadata(folder, metadata, model.digests)
    prompts = merge_prompt_csv(folder / "prompts.csv", cases)
    existing = {path.name for path in find_images(folder) if is_intact(path)}  # sorted into class folders or not
    requests = list(itertools.product(cases, range(images_per_seed)))
    missing: list[tuple[PromptCase, int]] = []
    for batch in shard.select(_batches(requests, sampling.sample_batch_size)):
        if not {image_filename(case.case_number, n) for case, n in batch} <= existing:
            missing += batch
    write_prompt_csv(folder / "prompts.csv", prompts)
    if find_metadata_file(folder) is None:
        write_json(folder / METADATA_FILE, metadata)
    num_generated = 0
    with compiled_unet(model, sampling.sample_batch_size) if compile_unet and missing else nullcontext():
        for case, n, image in generate(model, missing, sampling):
            filename = image_filename(case.case_number, n)
            if filename not in existing:
                save_image(folder / filename, image)
                num_generated += 1
    return num_generated
