"""TODO ledger.demo."""

from __future__ import annotations

from PIL import Image, ImageChops
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator
from copy import copy
from dataclasses import dataclass
import pandas as pd
from pathlib import Path
import shutil
import tempfile
import threading
import torch
from ldm.diffusion.edits import clone_sharing_weights
from ldm.diffusion.model import DiffusionModel
from ldm.diffusion.sampling import initial_noise, sample_trajectory
from ldm.diffusion.text_layers import text_layers
from ldm.erasure.export import FORMATS, export
from ldm.erasure.leakage import leakage_after_rounding
from ldm.erasure.merge import merge
from ldm.erasure.shift import WeightShift
from ldm.io.images import tensor_to_images
from ldm.io.paths import merge_name
from ldm.ledger.ledger import Ledger, status_table


MAX_PROMPT_CHARS, MAX_STEPS, MAX_GUIDANCE, MAX_CACHED = 1000, 200, 30.0, 32  # characters, steps, guidance, pictures that are kept


@dataclass(frozen=True)
class Comparison:
    """The same seed by the original and by the state, how they differ, and how far the state moves what the prompt puts out."""

    original: Image.Image
    present: Image.Image
    difference: Image.Image
    leak: float


class DemoSession:
    """A model and the shifts of its ledger. Each call makes its own U-Net, which shares all weights but those that its state changes;
    nothing that two calls share is ever changed, so that they may run at once. `fresh` loads the model anew, for an export."""

    def __init__(self, ledger: Ledger, model: DiffusionModel, fresh: Callable[[], DiffusionModel]):
        self.ledger, self.model, self.fresh = ledger, model, fresh
        self.shifts: dict[str, WeightShift] = {}
        self.erased: list[str] = []
        self.reload()
        self._originals: OrderedDict[tuple, Image.Image] = OrderedDict()
        self._lock = threading.Lock()

    def reload(self) -> pd.DataFrame:
        """The ledger's `table` as it stands now; what can be switched is what was ever erased."""
        ledger = Ledger(self.ledger.path)
        self.ledger, self.shifts = ledger, {name: ledger.load(entry) for name, entry in ledger.last_shifts().items()}
        self.erased = [concept.name for concept in ledger.concepts if concept.index in ledger.state()]
        return status_table(ledger)

    def select_shifts(self, names: Collection[str]) -> dict[str, WeightShift]:
        """The shifts of the concepts `names`, by index. Raises ValueError for a name that has none."""
        unknown = [name for name in names if name not in self.shifts]
        if unknown:
            raise ValueError(f"'{str(unknown[0])[:50]}' is no concept that can be switched here: choose from {', '.join(self.shifts)}")
        return {str(concept.index): self.shifts[concept.name] for concept in self.ledger.concepts if concept.name in names}

    def draw(self, prompt: str, seed: int, steps: int, guidance: float, names: Collection[str]) -> Iterator[float | Comparison]:
        """How much is done, from 0 to 1, again and again, and at last the pictures. Raises ValueError for what it refuses."""
        self.check(prompt, seed, steps, guidance)
        shifts = list(self.select_shifts(names).values())
        merged = merge(self.model.unet, shifts)
        state = copy(self.model)
        state.unet = clone_sharing_weights(self.model.unet, merged)
        key = prompt, seed, steps, guidance
        with self._lock:  # a tokenizer pads for one at a time
            original = self._originals.get(key)
            embedding, blank, seen = self.model.encode_prompt([prompt]), self.model.encode_uncond(), self.model.seen([prompt])
        models, drawn = [state] if original else [self.model, state], []
        for number, model in enumerate(models):
            for done, latents in enumerate(sample_trajectory(model, initial_noise(model, seed, 1), embedding, blank, steps, guidance), start=1):
                yield (number + done / steps) / len(models)
            drawn.append(tensor_to_images(model.decode(latents))[0])
        original, present = original or drawn[0], drawn[-1]
        with self._lock:
            self._originals[key] = original
            while len(self._originals) > MAX_CACHED:
                self._originals.popitem(last=False)
        leak = leakage_after_rounding(text_layers(self.model.unet), merged, seen)[prompt]
        yield Comparison(original, present, ImageChops.difference(original, present), leak)

    def check(self, prompt: str, seed: int, steps: int, guidance: float) -> None:
        """Raises ValueError, saying what to give instead, for what no picture is drawn from."""
        if not isinstance(prompt, str) or len(prompt) > MAX_PROMPT_CHARS:
            raise ValueError(f"the prompt has {len(prompt or '')} characters: give at most {MAX_PROMPT_CHARS}")
        limits = {"seed": (seed, 0, 2**31 - 1), "steps": (steps, 1, MAX_STEPS), "guidance": (guidance, 0, MAX_GUIDANCE)}
        for name, (value, least, most) in limits.items():
            if not isinstance(value, (int, float)) or isinstance(value, bool) or not least <= value <= most:
                raise ValueError(f"{name} is {value}: give a number from {least} to {most:g}")
        if seed != int(seed) or steps != int(steps):
            raise ValueError("seed and steps are whole numbers")

    def write(self, names: Collection[str], kind: str, folder: Path) -> Path:
        """The state of the concepts `names` erased as a .zip in `folder`, in one of `FORMATS`. Raises ValueError for no concept, or
        another format."""
        shifts = self.select_shifts(names)
        if not shifts or kind not in FORMATS:
            raise ValueError("switch a concept off first: without any this is the original" if not shifts else
                             f"'{str(kind)[:50]}' is no format: choose from {', '.join(FORMATS)}")
        place = folder / f"{self.model.name}-{merge_name(shifts)}"
        with tempfile.TemporaryDirectory() as partial:
            _, _, (target,) = export(self.fresh(), shifts, Path(partial) / place.name, [kind], torch.float32, None, 0.85,
                                     self.ledger.prompts, "app.py")
            return Path(shutil.make_archive(str(folder / target.name), "zip", target))
