"""What a live page about a ledger does for each visitor: erase concepts of their choice, compare and export."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops

from ldm.config.methods import FORMATS, ExportConfig
from ldm.config.models import load_model_config
from ldm.diffusion.edits import clone_sharing_weights
from ldm.diffusion.model import DiffusionModel
from ldm.diffusion.sampling import SeededNoise, sample_trajectory
from ldm.erasure.export import export
from ldm.erasure.leakage import embedding_leakage, leakage_after_rounding
from ldm.erasure.merge import by_form, gated_prompts, merge
from ldm.erasure.shift import WeightShift
from ldm.io.images import tensor_to_images
from ldm.io.paths import merge_name
from ldm.ledger.demo_state import LedgerState, RequestError, example_prompts, other_prompts
from ldm.ledger.ledger import Ledger

MAX_CHECKBOXES = 24  # concepts, of more of which boxes would be a wall
MAX_PROMPT_CHARS = 1000
MAX_INFERENCE_STEPS = 200
MAX_GUIDANCE_SCALE = 30.0
MAX_CACHED_IMAGES = 32  # of the original model
MAX_MEASURED_CHOICES = 64  # whose effect on other prompts is kept
MAX_EXPORTS = 4  # that are kept
EXAMPLE_SEED = 0


@dataclass(frozen=True)
class Comparison:
    """The same seed by the original and by the edited model, and the leakage on the prompt."""

    original: Image.Image
    edited: Image.Image
    leakage: float

    @cached_property
    def difference(self) -> Image.Image:
        """How the two images differ, unscaled."""
        return ImageChops.difference(self.original, self.edited)

    @cached_property
    def max_difference(self) -> int:
        """The largest difference of any pixel's channel, of 255; 0 for equal images."""
        return int(np.asarray(self.difference).max())

    @property
    def scale(self) -> int:
        """The largest whole number by which the difference can be multiplied so that nothing is cut off at 255."""
        return 255 // max(self.max_difference, 1)

    @property
    def scaled_difference(self) -> Image.Image:
        """The difference multiplied by `scale`, so that it can be seen."""
        return self.difference.point([min(value * self.scale, 255) for value in range(256)] * 3)


@dataclass(frozen=True)
class OtherPrompt:
    """A prompt that says no erased concept, whether the ledger protects it, and what the erasure does to it."""

    prompt: str
    is_protected: bool
    max_difference: int
    leakage: float


def _bounded(cache: OrderedDict, limit: int) -> None:
    """Remove from a cache what came first, until no more than `limit` is in it."""
    while len(cache) > limit:
        cache.popitem(last=False)


class DemoSession:
    """A model and the last shifts of its ledger, for many visitors at once.

    Each call makes its own U-Net, which shares all weights but those that its shifts change; nothing that two calls
    share is ever changed. `load_fresh_model` loads the model anew, for an export. `state` is replaced as a whole: a
    call reads it once.
    """

    def __init__(self, ledger: Ledger, model: DiffusionModel, load_fresh_model: Callable[[], DiffusionModel]):
        self.model, self.load_fresh_model = model, load_fresh_model
        config = load_model_config(model)
        self.form, self.sampling = config.edit.form, config.sampling
        self.state = LedgerState.read(ledger.path)
        # Of so many concepts a visitor chooses those that differ from the ledger, for as long as the page is served.
        self.has_switches = len(self.state.ledger.concepts) > MAX_CHECKBOXES
        self._originals: OrderedDict[tuple[str, int, int, float], Image.Image] = OrderedDict()
        self._exports: OrderedDict[tuple[Path, str], Path] = OrderedDict()
        self._example: tuple[tuple[str, tuple[str, ...]], Comparison] | None = None  # the last, with what it is of
        self._others: OrderedDict[tuple[str, ...], list[OtherPrompt]] = OrderedDict()
        self._lock = threading.Lock()  # of `_originals`, and of the tokenizer, which pads for one at a time
        # Of making a U-Net: while diffusers loads one, parameters of every other that is made lose their values.
        self._making = threading.Lock()
        self._exporting = threading.Lock()  # of `_exports`
        self._fresh = threading.Lock()  # so that no more than one further model is in memory
        self._measuring = threading.Lock()  # of `_example` and `_others`: what several wait for is made once
        model.encode_uncond()  # brings the text encoders to the device,
        model.vae.to(model.device)  # as this does the autoencoder, so that no two calls move them at once

    def reload(self) -> LedgerState:
        """Read the ledger as it stands now, and return it. Raises ValueError as `LedgerState.read`."""
        self.state = state = LedgerState.read(self.state.ledger.path, self.state)
        return state

    def chosen(self, names: Sequence[str]) -> Sequence[str]:
        """Return the names of what is erased for a visitor who chose `names`. Raises RequestError as `switched`."""
        return self.state.switched(names) if self.has_switches else names

    @contextmanager
    def fresh_model(self) -> Iterator[DiffusionModel]:
        """Lend the model loaded anew, which the block may change; one at a time.

        Raises ValueError if the model's files are no longer those of the model.
        """
        with self._fresh:
            with self._making:
                model = self.load_fresh_model()
            if model.digest != self.model.digest:
                raise ValueError(
                    f"the files of {self.model.name} have changed since it was loaded: serve the page anew"
                )
            yield model

    def compare(
        self, prompt: str, seed: int, num_inference_steps: int, guidance_scale: float, names: Collection[str]
    ) -> Iterator[float | Comparison]:
        """Yield, again and again, the fraction that is done, and at last what erasing the concepts `names` changes.

        Raises RequestError as `validate_request` and `select_shifts`.
        """
        self.validate_request(prompt, seed, num_inference_steps, guidance_scale)
        seed, num_inference_steps = int(seed), int(num_inference_steps)
        gated, linear = by_form(self.state.select_shifts(names), self.form)
        merged = merge(self.model.denoiser, list(linear.values()))
        edited_model = copy(self.model)
        edited_model.embedding_edit = gated_prompts(self.model, gated)
        with self._making:
            edited_model.denoiser = clone_sharing_weights(self.model.denoiser, merged)
        key = prompt, seed, num_inference_steps, guidance_scale
        with self._lock:
            original = self._originals.get(key)
            prompt_embeds, uncond_embeds = self.model.encode_prompt([prompt]), self.model.encode_uncond()
            edited_embeds = edited_model.encode_prompt([prompt])
        models, images = [edited_model] if original else [self.model, edited_model], []
        for number, model in enumerate(models):
            noise = SeededNoise.sample(model, [(seed, 0)])
            embeds = edited_embeds if model is edited_model else prompt_embeds
            trajectory = sample_trajectory(model, noise, embeds, uncond_embeds, num_inference_steps, guidance_scale)
            latents = noise.initial
            for done, current in enumerate(trajectory, start=1):
                latents = current
                yield (number + min(done / num_inference_steps, 1)) / len(models)
            images.append(tensor_to_images(model.decode(latents))[0])
        original, edited = original or images[0], images[-1]
        with self._lock:
            self._originals[key] = original
            _bounded(self._originals, MAX_CACHED_IMAGES)
        layers, before = self.model.text_layers, self.model.layer_inputs(prompt_embeds)[0]
        leakage = leakage_after_rounding(layers, merged, {prompt: before})[prompt]
        if gated:
            leakage = max(leakage, embedding_leakage(layers, before, self.model.layer_inputs(edited_embeds)[0]))
        yield Comparison(original, edited, leakage)

    def example(self, state: LedgerState) -> tuple[str, Comparison]:
        """Return a prompt, and what a ledger's erasures change for it: made once for each state of the ledger."""
        prompt = next(iter(example_prompts(state).values()))
        key = prompt, state.digests_of(state.erased)
        example = self._example
        if example is None or example[0] != key:
            with self._measuring:
                example = self._example
                if example is None or example[0] != key:  # which nobody made while this waited
                    example = self._example = key, self._compare_by_default(prompt, state.erased)
        return prompt, example[1]

    def measure_others(self, names: Collection[str]) -> Sequence[OtherPrompt]:
        """Return what erasing the concepts `names` does to some `other_prompts`, none for no concept.

        It is measured once for each of the last choices. Raises RequestError as `select_shifts`.
        """
        state = self.state
        state.select_shifts(names)
        key = state.digests_of(names)
        measured = self._others.get(key) if names else []
        if measured is not None:
            return measured
        with self._measuring:
            if key in self._others:  # by who was waited for
                return self._others[key]
            measured = []
            for prompt, is_protected in other_prompts(state, names).items():
                comparison = self._compare_by_default(prompt, names)
                measured.append(OtherPrompt(prompt, is_protected, comparison.max_difference, comparison.leakage))
            if self.state.digests_of(names) == key:  # and not made again meanwhile
                self._others[key] = measured
                _bounded(self._others, MAX_MEASURED_CHOICES)
            return measured

    def _compare_by_default(self, prompt: str, names: Collection[str]) -> Comparison:
        """Return what erasing the concepts `names` changes, at the first seed and with the model's own settings."""
        settings = self.sampling.num_inference_steps, self.sampling.guidance_scale
        for result in self.compare(prompt, EXAMPLE_SEED, *settings, names):
            if isinstance(result, Comparison):
                return result
        raise AssertionError("a comparison ends with its result")

    def validate_request(self, prompt: str, seed: int, num_inference_steps: int, guidance_scale: float) -> None:
        """Raise RequestError, saying what to give instead, for what no image is generated from."""
        if not isinstance(prompt, str):
            raise RequestError("the prompt is no text: give one")
        if len(prompt) > MAX_PROMPT_CHARS:
            raise RequestError(f"the prompt has {len(prompt)} characters: give at most {MAX_PROMPT_CHARS}")
        limits = {
            "seed": (seed, 0, 2**31 - 1),
            "num_inference_steps": (num_inference_steps, 1, MAX_INFERENCE_STEPS),
            "guidance_scale": (guidance_scale, 0, MAX_GUIDANCE_SCALE),
        }
        for name, (value, minimum, maximum) in limits.items():
            is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not is_number or not minimum <= value <= maximum:
                raise RequestError(f"{name} is {str(value)[:50]}: give a number from {minimum} to {maximum:g}")
        if seed != int(seed) or num_inference_steps != int(num_inference_steps):
            raise RequestError("seed and num_inference_steps are whole numbers")

    def export_zip(self, names: Collection[str], file_format: str, folder: Path) -> Path:
        """Write the model without the concepts `names`, in one of `FORMATS`, as a .zip below `folder`; return its path.

        The same shifts in the same format are written once, and the last `MAX_EXPORTS` are kept. Raises RequestError
        for no concept, for one that was never erased, and for a format that there is not or that cannot hold these
        shifts; ValueError if the model's files are no longer those of the model.
        """
        state = self.state
        shifts = state.select_shifts(names)
        if not shifts:
            raise RequestError("choose a concept to erase first: without any this is the original")
        if file_format not in FORMATS:
            raise RequestError(f"'{str(file_format)[:50]}' is no format: choose from {', '.join(FORMATS)}")
        content = json.dumps([file_format, state.digests_of(names)])  # a concept's shift can be made again
        key = folder, hashlib.sha256(content.encode()).hexdigest()
        with self._exporting:
            path = self._exports.pop(key, None)
            if path is None or not path.is_file():
                path = self._write_zip(state.ledger.prompts, shifts, file_format, folder / key[1])
            self._exports[key] = path
            while len(self._exports) > MAX_EXPORTS:
                _, oldest = self._exports.popitem(last=False)
                shutil.rmtree(oldest.parent, ignore_errors=True)
            return path

    def _write_zip(
        self, prompts: Collection[str], shifts: dict[str, WeightShift], file_format: str, folder: Path
    ) -> Path:
        """Write the model with `shifts` as a .zip in the new folder `folder`, which is there whole or not at all."""
        folder.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(folder, ignore_errors=True)
        with self.fresh_model() as model, tempfile.TemporaryDirectory(dir=folder.parent) as partial:
            output_dir = Path(partial) / f"{self.model.name}-{merge_name(shifts)}"
            try:
                result = export(model, shifts, output_dir, ExportConfig(formats=(file_format,)), list(prompts))
            except ValueError as error:
                raise RequestError(f"this choice cannot be written as {file_format}: choose another format") from error
            (target,) = result.targets
            (Path(partial) / "zip").mkdir()
            archive = Path(shutil.make_archive(str(Path(partial) / "zip" / target.name), "zip", target))
            archive.parent.rename(folder)
        return folder / archive.name
