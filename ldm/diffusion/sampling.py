"""TODO diffusion.sampling."""

from __future__ import annotations

from PIL import Image
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
import itertools
from pathlib import Path
import torch
from tqdm import tqdm
from ldm.diffusion.model import DiffusionModel
from ldm.io.files import METADATA_FILE, check_metadata, write_json
from ldm.io.images import image_filename, save_image, tensor_to_images
from ldm.io.prompts import PromptCase, merge_prompt_csv, write_prompt_csv
from ldm.io.sharding import Shard


_MAX_LATENTS = 64  # latents that the U-Net takes in one pass: with more, what its layers hand on leaves a CPU's caches


def initial_noise(model: DiffusionModel, seed: int, samples: int) -> torch.Tensor:
    """The noise that `seed` starts its `samples` images from, (samples, C, h, w), the same on every device."""
    return torch.randn((samples, *model.latent_shape), generator=torch.Generator().manual_seed(seed))


def make_scheduler(model: DiffusionModel, steps: int):
    """A fresh scheduler of the model's own kind, set to `steps` steps."""
    scheduler = type(model.scheduler).from_config(model.scheduler.config)
    scheduler.set_timesteps(steps, device=model.device)
    return scheduler


@torch.no_grad()
def sample_trajectory(model: DiffusionModel, noise: torch.Tensor, embedding: torch.Tensor, blank: torch.Tensor, steps: int,
              guidance: float) -> Iterator[torch.Tensor]:
    """From noise (N, C, h, w) to clean latents under prompts `embedding` (N, rows, d), by the model's own scheduler: the latents
    after each step, as noisy as the next one expects them.

    The guided noise is `eps("") + guidance (eps(c) - eps(""))` (Ho and Salimans, arXiv 2207.12598).
    """
    scheduler = make_scheduler(model, steps)
    latents = noise.to(model.device) * scheduler.init_noise_sigma
    both = torch.cat([blank.expand_as(embedding), embedding])  # (2N, rows, d)
    for step in scheduler.timesteps:
        doubled = scheduler.scale_model_input(torch.cat([latents, latents]), step)
        parts = zip(doubled.split(_MAX_LATENTS), both.split(_MAX_LATENTS))
        unconditional, conditional = torch.cat([model.predict(part, step, prompts) for part, prompts in parts]).chunk(2)
        noise = unconditional + guidance * (conditional - unconditional)
        latents = scheduler.step(noise, step, latents).prev_sample
        yield latents


def sample_latents(model: DiffusionModel, noise: torch.Tensor, embedding: torch.Tensor, blank: torch.Tensor, steps: int,
            guidance: float, stop: int | None = None) -> torch.Tensor:
    """The last latents of `denoising`, or with `stop` those after the first `stop` of the `steps` steps."""
    latents = noise * make_scheduler(model, steps).init_noise_sigma
    for latents in itertools.islice(sample_trajectory(model, noise, embedding, blank, steps, guidance), stop):
        pass
    return latents


@contextmanager
def compiled_unet(model: DiffusionModel, batch: int) -> Iterator[None]:
    """While the block runs, the U-Net draws `batch` images at a time by torch.compile, and other numbers as before: faster, after
    minutes of compiling that torch keeps for the next time. Raises ValueError where this machine cannot compile."""
    unet, blank = model.unet, model.encode_uncond()
    model.unet = torch.compile(unet, dynamic=False)
    print(f"compiling the U-Net for {batch} images at a time", flush=True)
    try:
        sample_latents(model, torch.zeros(batch, *model.latent_shape), blank.expand(batch, -1, -1), blank, 1, 1.0)
        with torch.compiler.set_stance("eager_on_recompile"):
            yield
    except torch._dynamo.exc.BackendCompilerFailed as error:
        raise ValueError("torch.compile does not work on this machine: leave --compile out, or see to what it says: "
                         f"{error.inner_exception}") from error
    finally:
        model.unet = unet


def generate(model: DiffusionModel, wanted: Sequence[tuple[PromptCase, int]], steps: int, guidance: float,
             batch: int) -> Iterator[tuple[PromptCase, int, Image.Image]]:
    """Draw the wanted (case, n) pairs, `batch` at a time: the n-th image of each case's seed."""
    blank = model.encode_uncond()
    known = {prompt: model.encode_prompt([prompt])[0] for prompt in dict.fromkeys(case.prompt for case, _ in wanted)}
    with tqdm(total=len(wanted), desc="images", unit="image") as bar:
        for start in range(0, len(wanted), batch):
            part = wanted[start:start + batch]
            noise = torch.stack([initial_noise(model, case.seed, n + 1)[n] for case, n in part])
            embedding = torch.stack([known[case.prompt] for case, _ in part])
            images = tensor_to_images(model.decode(sample_latents(model, noise, embedding, blank, steps, guidance)))
            for (case, n), image in zip(part, images):
                yield case, n, image
            bar.update(len(part))


def generate_to_folder(model: DiffusionModel, cases: Sequence[PromptCase], folder: Path, recipe: dict, samples: int, steps: int,
                    guidance: float, batch: int, share: Shard = Shard(), fast: bool = False) -> int:
    """Draw every image of `cases` that `folder` lacks, `samples` each; returns how many were drawn.

    Which images are drawn together is the same in every run, and of several processes each draws its `share` of such batches:
    so the files are the same to the last bit, however often a run was stopped, and however many processes there are. The
    folder gets `prompts.csv` and `recipe.json` too; `fast` draws by torch.compile (`compiled`), whose last bits are others.
    Raises ValueError when the folder holds images of another recipe, or of another prompt or seed under the same case number.
    """
    recipe = recipe | {"ddim_steps": steps, "guidance_scale": guidance} | ({"compiled": True} if fast else {})
    check_metadata(folder, recipe)
    merged = merge_prompt_csv(folder / "prompts.csv", cases)
    there = {path.name for path in folder.rglob("*.png")}  # sorted into class folders or not
    wanted = [(case, n) for case in cases for n in range(samples)]
    batches = share.of([wanted[start:start + batch] for start in range(0, len(wanted), batch)])
    lacking = [pair for part in batches if not {image_filename(case.number, n) for case, n in part} <= there for pair in part]
    write_prompt_csv(folder / "prompts.csv", merged)
    write_json(folder / METADATA_FILE, recipe)
    drawn = 0
    with compiled_unet(model, batch) if fast and lacking else nullcontext():
        for case, n, image in generate(model, lacking, steps, guidance, batch):
            if image_filename(case.number, n) not in there:
                save_image(folder / image_filename(case.number, n), image)
                drawn += 1
    return drawn
