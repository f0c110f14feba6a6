"""Folders of generated images, which a stopped run resumes."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from ldm.config.methods import SamplingConfig
from ldm.diffusion.model import DiffusionModel
from ldm.diffusion.sampling import batches_of, compiled_unet, generate, try_scheduler
from ldm.io.errors import notify
from ldm.io.files import METADATA_FILE, check_metadata, find_metadata_file, write_json
from ldm.io.images import find_images, image_filename, is_intact, read_origin, save_image
from ldm.io.prompts import PromptCase, merge_prompt_csv, write_prompt_csv
from ldm.io.sharding import Shard


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
    Raises ValueError when the folder holds images of other metadata, or of another prompt or seed under a case number,
    and for settings by which no image can be generated.
    """
    metadata = {
        **metadata,
        "num_inference_steps": sampling.num_inference_steps,
        "guidance_scale": sampling.guidance_scale,
    }
    if compile_unet:
        metadata["compiled"] = True
    if try_scheduler(model, sampling.num_inference_steps):
        metadata["added_noise"] = "by seed"  # which older versions did not do
    if not cases:
        notify(f"no case is left to generate into {folder}: see the prompt list and `start_case`")
    model.notify_of_cuts([case.prompt for case in cases])
    images = find_images(folder)
    prompts = list(cases)
    if images:  # else what is there was left by a run that made none
        check_metadata(folder, metadata, model.digests)
        prompts = merge_prompt_csv(folder / "prompts.csv", cases)
    known = {image_filename(case.case_number, n): (case, n) for case in cases for n in range(images_per_seed)}
    existing = {path.name for path in images if _is_kept(path, known)}  # sorted into class folders or not
    requests = list(itertools.product(cases, range(images_per_seed)))
    missing: list[tuple[PromptCase, int]] = []
    for batch in shard.select(batches_of(requests, sampling.sample_batch_size)):
        if not {image_filename(case.case_number, n) for case, n in batch} <= existing:
            missing += batch
    write_prompt_csv(folder / "prompts.csv", prompts)
    if not images or find_metadata_file(folder) is None:
        write_json(folder / METADATA_FILE, metadata)
    num_generated = 0
    with compiled_unet(model, sampling.sample_batch_size) if compile_unet and missing else nullcontext():
        for case, n, image in generate(model, missing, sampling):
            filename = image_filename(case.case_number, n)
            if filename not in existing:
                save_image(folder / filename, image, _origin(case, n))
                num_generated += 1
    return num_generated


def _origin(case: PromptCase, n: int) -> dict[str, Any]:
    """Return what an image's file says of where it comes from."""
    return {"prompt": case.prompt, "seed": case.seed, "n": n}


def _is_kept(path: Path, known: Mapping[str, tuple[PromptCase, int]]) -> bool:
    """Return whether an image is whole, and the one that its name says; one of an older version does not say which."""
    if not is_intact(path):
        return False
    origin = read_origin(path)
    return origin is None or path.name not in known or origin == _origin(*known[path.name])
