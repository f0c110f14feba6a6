"""What a live page about a ledger does for each visitor: erase concepts of their choice, compare and export."""

from __future__ import annotations

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
from ldm.diffusion.edits import clone_sharing_weights
from ldm.diffusion.model import DiffusionModel
from ldm.diffusion.sampling import initial_noise, sample_trajectory
from ldm.diffusion.text_layers import text_layers
from ldm.erasure.export import export
from ldm.erasure.leakage import leakage_after_rounding
from ldm.erasure.merge import merge
from ldm.erasure.shift import WeightShift
from ldm.io.images import tensor_to_images
from ldm.io.paths import merge_name
from ldm.ledger.ledger import Ledger, status_table

MAX_PROMPT_CHARS = 1000
MAX_INFERENCE_STEPS = 200
MAX_GUIDANCE_SCALE = 30.0
MAX_CACHED_IMAGES = 32  # of the original model


@dataclass(frozen=True)
class Comparison:
    """The same seed by the original and by the edited model, how the images differ, and the leakage on the prompt."""

    original: Image.Image
    edited: Image.Image
    difference: Image.Image
    leakage: float


class DemoSession:
    """A model and the last shifts of its ledger, for many visitors at once.

    Each call makes its own U-Net, which shares all weights but those that its shifts change; nothing that two calls
    share is ever changed. `load_fresh_model` loads the model anew, for an export.
    """

    def __init__(self, ledger: Ledger, model: DiffusionModel, load_fresh_model: Callable[[], DiffusionModel]):
        self.ledger, self.model, self.load_fresh_model = ledger, model, load_fresh_model
        self.shifts: dict[str, WeightShift] = {}  # by the concept's name: what was ever erased
        self.erased: list[str] = []
        self.reload()
        self._originals: OrderedDict[tuple[str, int, int, float], Image.Image] = OrderedDict()
        self._lock = threading.Lock()

    def reload(self) -> pd.DataFrame:
        """Read the ledger as it stands now, and return its `status_table`.

        Raises ValueError for a ledger or a shift that is not what was written.
        """
        ledger = Ledger(self.ledger.path)
        shifts = {name: ledger.load(record) for name, record in ledger.last_shifts().items()}
        active = ledger.active_shifts()
        self.ledger, self.shifts = ledger, shifts
        self.erased = [concept.name for concept in ledger.concepts if concept.index in active]
        return status_table(ledger)

    def select_shifts(self, names: Collection[str]) -> dict[str, WeightShift]:
        """Return the shifts of the concepts `names`, by index. Raises ValueError for a name that has none."""
        for name in names:
            if name not in self.shifts:
                choices = ", ".join(self.shifts)
                raise ValueError(f"'{str(name)[:50]}' is no concept that can be erased here: choose from {choices}")
        concepts = [concept for concept in self.ledger.concepts if concept.name in names]
        return {str(concept.index): self.shifts[concept.name] for concept in concepts}

    def compare(
        self, prompt: str, seed: int, num_inference_steps: int, guidance_scale: float, names: Collection[str]
    ) -> Iterator[float | Comparison]:
        """Yield, again and again, the fraction that is done, and at last what erasing the concepts `names` changes.

        Raises ValueError as `validate_request` and `select_shifts`.
        """
        self.validate_request(prompt, seed, num_inference_steps, guidance_scale)
        merged = merge(self.model.unet, list(self.select_shifts(names).values()))
        edited_model = copy(self.model)
        edited_model.unet = clone_sharing_weights(self.model.unet, merged)
        key = prompt, seed, num_inference_steps, guidance_scale
        with self._lock:  # a tokenizer pads for one at a time
            original = self._originals.get(key)
            prompt_embeds, uncond_embeds = self.model.encode_prompt([prompt]), self.model.encode_uncond()
            embeds = self.model.embed_prompts([prompt])
        models, images = [edited_model] if original else [self.model, edited_model], []
        for number, model in enumerate(models):
            noise = initial_noise(model, seed, 1)
            trajectory = sample_trajectory(
                model, noise, prompt_embeds, uncond_embeds, num_inference_steps, guidance_scale
            )
            latents = noise
            for done, current in enumerate(trajectory, start=1):
                latents = current
                yield (number + done / num_inference_steps) / len(models)
            images.append(tensor_to_images(model.decode(latents))[0])
        original, edited = original or images[0], images[-1]
        with self._lock:
            self._originals[key] = original
            while len(self._originals) > MAX_CACHED_IMAGES:
                self._originals.popitem(last=False)
        leakage = leakage_after_rounding(text_layers(self.model.unet), merged, embeds)[prompt]
        yield Comparison(original, edited, ImageChops.difference(original, edited), leakage)

    def validate_request(self, prompt: str, seed: int, num_inference_steps: int, guidance_scale: float) -> None:
        """Raise ValueError, saying what to give instead, for what no image is generated from."""
        if not isinstance(prompt, str) or len(prompt) > MAX_PROMPT_CHARS:
            raise ValueError(f"the prompt has {len(prompt or '')} characters: give at most {MAX_PROMPT_CHARS}")
        limits = {
            "seed": (seed, 0, 2**31 - 1),
            "num_inference_steps": (num_inference_steps, 1, MAX_INFERENCE_STEPS),
            "guidance_scale": (guidance_scale, 0, MAX_GUIDANCE_SCALE),
        }
        for name, (value, minimum, maximum) in limits.items():
            is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not is_number or not minimum <= value <= maximum:
                raise ValueError(f"{name} is {value}: give a number from {minimum} to {maximum:g}")
        if seed != int(seed) or num_inference_steps != int(num_inference_steps):
            raise ValueError("seed and num_inference_steps are whole numbers")

    def export_zip(self, names: Collection[str], file_format: str, folder: Path) -> Path:
        """Write the model without the concepts `names`, in one of `FORMATS`, as a .zip in `folder`; return its path.

        Raises ValueError for no concept, for one that was never erased, and for another format.
        """
        shifts = self.select_shifts(names)
        if not shifts:
            raise ValueError("choose a concept to erase first: without any this is the original")
        if file_format not in FORMATS:
            raise ValueError(f"'{str(file_format)[:50]}' is no format: choose from {', '.join(FORMATS)}")
        config = ExportConfig(formats=(file_format,))
        with tempfile.TemporaryDirectory() as partial:
            output_dir = Path(partial) / f"{self.model.name}-{merge_name(shifts)}"
            result = export(self.load_fresh_model(), shifts, output_dir, config, self.ledger.prompts)
            (target,) = result.targets
            return Path(shutil.make_archive(str(folder / target.name), "zip", target))
