"""What a live page about a ledger does for each visitor: erase concepts of their choice, compare and export."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator
from copy import copy
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from PIL import Image, ImageChops

from ldm.config.methods import FORMATS, ExportConfig
from ldm.config.models import load_model_config
from ldm.diffusion.edits import clone_sharing_weights
from ldm.diffusion.model import DiffusionModel
from ldm.diffusion.sampling import SeededNoise, sample_trajectory
from ldm.diffusion.text_layers import text_layers
from ldm.erasure.export import export
from ldm.erasure.leakage import embedding_leakage, leakage_after_rounding
from ldm.erasure.merge import by_form, gated_prompts, merge
from ldm.erasure.shift import WeightShift
from ldm.io.images import tensor_to_images
from ldm.io.paths import merge_name
from ldm.ledger.ledger import Ledger, status_table

MAX_PROMPT_CHARS = 1000
MAX_INFERENCE_STEPS = 200
MAX_GUIDANCE_SCALE = 30.0
MAX_CACHED_IMAGES = 32  # of the original model
MAX_EXPORTS = 4  # that are kept


class RequestError(ValueError):
    """Say what a visitor can mend. Every visitor reads its text, which names no file."""


@dataclass(frozen=True)
class Comparison:
    """The same seed by the original and by the edited model, how the images differ, and the leakage on the prompt."""

    original: Image.Image
    edited: Image.Image
    difference: Image.Image
    leakage: float


@dataclass(frozen=True)
class LedgerState:
    """A ledger as it was read at one time.

    `shifts` and `digests`, of their files, are by the concept's name: what was ever erased. `erased` are the names of
    the concepts that are erased now.
    """

    ledger: Ledger
    shifts: dict[str, WeightShift]
    digests: dict[str, str]
    erased: list[str]

    @classmethod
    def read(cls, path: Path) -> LedgerState:
        """Return the ledger in a file. Raises ValueError for a ledger or a shift that is not what was written."""
        ledger = Ledger(path)
        records, active = ledger.last_shifts(), ledger.active_shifts()
        shifts = {name: ledger.load(record) for name, record in records.items()}
        digests = {name: record["digest"] for name, record in records.items()}
        return cls(ledger, shifts, digests, [concept.name for concept in ledger.concepts if concept.label in active])

    @property
    def table(self) -> pd.DataFrame:
        """Return the ledger's `status_table`."""
        return status_table(self.ledger)

    def select_shifts(self, names: Collection[str]) -> dict[str, WeightShift]:
        """Return the shifts of the concepts `names`, by label. Raises RequestError for a name that has none."""
        if not isinstance(names, (list, tuple, set)):
            raise RequestError("give a list of concepts' names")
        for name in names:
            if not isinstance(name, str) or name not in self.shifts:
                choices = ", ".join(self.shifts)
                raise RequestError(f"'{str(name)[:50]}' is no concept that can be erased here: choose from {choices}")
        concepts = [concept for concept in self.ledger.concepts if concept.name in names]
        return {concept.label: self.shifts[concept.name] for concept in concepts}


class DemoSession:
    """A model and the last shifts of its ledger, for many visitors at once.

    Each call makes its own U-Net, which shares all weights but those that its shifts change; nothing that two calls
    share is ever changed. `load_fresh_model` loads the model anew, for an export. `state` is replaced as a whole: a
    call reads it once.
    """

    def __init__(self, ledger: Ledger, model: DiffusionModel, load_fresh_model: Callable[[], DiffusionModel]):
        self.model, self.load_fresh_model = model, load_fresh_model
        self.form = load_model_config(model.config_name).edit.form
        self.state = LedgerState.read(ledger.path)
        self._originals: OrderedDict[tuple[str, int, int, float], Image.Image] = OrderedDict()
        self._exports: OrderedDict[tuple[Path, str], Path] = OrderedDict()
        self._lock = threading.Lock()  # of `_originals`, and of the tokenizer, which pads for one at a time
        # Of making a U-Net: while diffusers loads one, parameters of every other that is made lose their values.
        self._making = threading.Lock()
        self._exporting = threading.Lock()  # of `_exports`, and so that no more than one further model is in memory
        model.encode_uncond()  # brings the text encoders to the device,
        model.vae.to(model.device)  # as this does the autoencoder, so that no two calls move them at once

    def reload(self) -> LedgerState:
        """Read the ledger as it stands now, and return it. Raises ValueError as `LedgerState.read`."""
        self.state = state = LedgerState.read(self.state.ledger.path)
        return state

    def compare(
        self, prompt: str, seed: int, num_inference_steps: int, guidance_scale: float, names: Collection[str]
    ) -> Iterator[float | Comparison]:
        """Yield, again and again, the fraction that is done, and at last what erasing the concepts `names` changes.

        Raises RequestError as `validate_request` and `select_shifts`.
        """
        self.validate_request(prompt, seed, num_inference_steps, guidance_scale)
        seed, num_inference_steps = int(seed), int(num_inference_steps)
        gated, linear = by_form(self.state.select_shifts(names), self.form)
        merged = merge(self.model.unet, list(linear.values()))
        edited_model = copy(self.model)
        edited_model.embedding_edit = gated_prompts(self.model, gated)
        with self._making:
            edited_model.unet = clone_sharing_weights(self.model.unet, merged)
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
                yield (number + done / num_inference_steps) / len(models)
            images.append(tensor_to_images(model.decode(latents))[0])
        original, edited = original or images[0], images[-1]
        with self._lock:
            self._originals[key] = original
            while len(self._originals) > MAX_CACHED_IMAGES:
                self._originals.popitem(last=False)
        layers, before = text_layers(self.model.unet), self.model.drop_pooled(prompt_embeds)[0]
        leakage = leakage_after_rounding(layers, merged, {prompt: before})[prompt]
        if gated:
            leakage = max(leakage, embedding_leakage(layers, before, self.model.drop_pooled(edited_embeds)[0]))
        yield Comparison(original, edited, ImageChops.difference(original, edited), leakage)

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
        digests = {name: digest for name, digest in state.digests.items() if name in names}
        content = json.dumps([file_format, sorted(digests.items())])  # a concept's shift can be made again
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
        with self._making:
            model = self.load_fresh_model()
        if model.digest != self.model.digest:
            raise ValueError(f"the files of {self.model.name} have changed since it was loaded: serve the page anew")
        folder.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(folder, ignore_errors=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as partial:
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
