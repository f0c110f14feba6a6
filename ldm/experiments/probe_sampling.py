"""Probes by other ways to an image: guidance, samplers and steps; completion of images that show the concept."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import diffusers
import torch
from PIL import Image, ImageOps

from ldm.config.concepts import Concept
from ldm.diffusion.completion import complete, find_completion
from ldm.diffusion.model import DiffusionModel
from ldm.experiments.probe import UNEDITED, Bench, Finding, Subject
from ldm.io.errors import notify
from ldm.io.files import METADATA_FILE, check_metadata, find_metadata_file, stream_digest, write_json
from ldm.io.images import is_intact, open_image, save_image

GUIDANCES = (1.5, 4.0, 7.5)
STEPS = (10, 50)
_SAMPLERS = {"DDIMScheduler": {"clip_sample": False}, "EulerDiscreteScheduler": {}}  # latents are not within [-1, 1]
_FLOW_SAMPLERS = {"FlowMatchEulerDiscreteScheduler": {}}  # since pipelines call for what others do not take
STRENGTHS = (0.5, 0.75)  # of the noise that is given to images, a fraction of all timesteps


class _OfName:
    """What a probe does that asks for the concept by its name. Its floor is of the unedited model and no prompt."""

    def measure(self, bench: Bench, subject: Subject, concept: Concept) -> list[Finding]:
        """Return the share of images under the name that show the concept, of each kind."""
        return self._measure(bench, subject, concept, concept.prompt)

    def floor(self, bench: Bench, concept: Concept) -> list[Finding]:
        """Return what the unedited model makes under the empty prompt."""
        return self._measure(bench, UNEDITED, concept, "")

    def _measure(self, bench: Bench, subject: Subject, concept: Concept, prompt: str) -> list[Finding]:
        raise NotImplementedError


class Samplers(_OfName):
    """(f) Does other guidance, another sampler, or another number of steps bring the concept back?"""

    name: ClassVar[str] = "guidance, samplers, steps"
    is_slow: ClassVar[bool] = False
    is_of_all: ClassVar[bool] = False

    def _measure(self, bench: Bench, subject: Subject, concept: Concept, prompt: str) -> list[Finding]:
        findings = []
        adapter = bench.model.adapter
        samplers = _FLOW_SAMPLERS if adapter.is_flow else _SAMPLERS
        guidances = GUIDANCES if adapter.takes_guidance(bench.model.pipeline) else GUIDANCES[:1]
        for (sampler, settings), steps, guidance in itertools.product(samplers.items(), STEPS, guidances):
            kind = f"{sampler.removesuffix('Scheduler')}, {steps} steps, guidance {guidance:g}"
            place = bench.place(subject, concept, self.name, kind.replace(",", ""), *([] if prompt else ["empty"]))
            with with_scheduler(bench.model, sampler, settings):
                paths = bench.generate(subject, place, [prompt], num_inference_steps=steps, guidance_scale=guidance)
            findings.append(bench.shown(kind, paths, concept))
        return findings


@contextmanager
def with_scheduler(model: DiffusionModel, name: str, settings: Mapping[str, Any]) -> Iterator[None]:
    """While the block runs, let the model sample by a scheduler of diffusers, with its own settings and others."""
    before, metadata = model.scheduler, model.generation_metadata
    model.scheduler = getattr(diffusers, name).from_config(before.config, **settings)
    config = {key: value for key, value in model.scheduler.config.items() if not key.startswith("_")}
    model.generation_metadata = metadata | {"scheduler": name, "scheduler_config": config}
    try:
        yield
    finally:
        model.scheduler, model.generation_metadata = before, metadata


class Completion(_OfName):
    """(g) Does the model complete images of the concept, from partial noise or beside what it sees of them?

    What is generated anew is the right half, which is judged beside its mirror image: nothing of the given half counts.
    """

    name: ClassVar[str] = "completion"
    is_slow: ClassVar[bool] = False
    is_of_all: ClassVar[bool] = False

    def _measure(self, bench: Bench, subject: Subject, concept: Concept, prompt: str) -> list[Finding]:
        if find_completion(bench.model) is None:
            notify(f"diffusers has no pipeline that completes images by {bench.model.family}: this probe is left out")
            return []
        examples = bench.examples(concept, bench.images)
        images, digests = [open_image(path) for path in examples], [stream_digest(path) for path in examples]
        findings = []
        for kind, strength in (*((f"from noise at {each:g}", each) for each in STRENGTHS), ("in-painting", None)):
            folder = bench.place(subject, concept, self.name, kind, *([] if prompt else ["empty"]))
            paths = [folder / f"{number}.png" for number in range(len(images))]
            made_from = {"prompt": prompt, "strength": strength, "examples": digests}
            _check_folder(bench, subject, folder, paths, made_from)
            if not all(map(is_intact, paths)):
                with bench.edited(subject):
                    made = _complete(bench, images, prompt, strength)
                for path, image in zip(paths, made, strict=True):
                    save_image(path, image)
            findings.append(bench.shown(kind, paths, concept))
        return findings


def _check_folder(
    bench: Bench, subject: Subject, folder: Path, paths: Sequence[Path], made_from: Mapping[str, Any]
) -> None:
    """Raise ValueError where the folder's images were made otherwise, and say there how they are made."""
    metadata = {**bench.metadata(subject), **made_from} | {
        "num_inference_steps": bench.sampling.num_inference_steps,
        "guidance_scale": bench.sampling.guidance_scale,
    }
    if find_metadata_file(folder) is not None and any(path.is_file() for path in paths):
        check_metadata(folder, metadata, bench.model.digests)
    else:
        write_json(folder / METADATA_FILE, metadata)


def _complete(bench: Bench, images: Sequence[Image.Image], prompt: str, strength: float | None) -> list[Image.Image]:
    """Return images completed from noise of a strength; without one the right halves, each beside its mirror."""
    model, sampling = bench.model, bench.sampling
    arguments = sampling.num_inference_steps, sampling.guidance_scale
    pipe, made = find_completion(model), list[Image.Image]()
    for start in range(0, len(images), sampling.sample_batch_size):
        some = images[start : start + sampling.sample_batch_size]
        seeds = [bench.seed + start + number for number in range(len(some))]
        given = model, pipe, some, prompt, seeds, *arguments
        made += complete(*given, strength) if strength else complete(*given, hidden=_right_half(model))
    return made if strength else [_beside_mirror(image) for image in made]


def _right_half(model: DiffusionModel) -> torch.Tensor:
    """Return what is hidden of latents (h, w): the right half."""
    shape = model.latent_shape
    side = shape[-1] if len(shape) == 3 else round(shape[0] ** 0.5)  # of packed latents a row is a place
    hidden = torch.zeros(side, side)
    hidden[:, side // 2 :] = 1
    return hidden


def _beside_mirror(image: Image.Image) -> Image.Image:
    half = image.crop((image.width // 2, 0, image.width, image.height))
    whole = image.copy()
    whole.paste(ImageOps.mirror(half), (0, 0))
    return whole
