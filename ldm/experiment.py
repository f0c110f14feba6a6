"""What scenes and ablations share: shifts made from pictures that the model draws, and each set of weights measured once."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pandas as pd

from ldm.checkpoint import file_digest
from ldm.concepts import Concept, erasable, load_concepts
from ldm.erasure import make_shifts, solve
from ldm.images import Case, seeded_cases
from ldm.losses import METHODS
from ldm.metrics.classify import Classifier
from ldm.metrics.compare import compare
from ldm.model import TextToImage, settings
from ldm.sampling import generate_folder
from ldm.shift import WeightShift, applied
from ldm.store import Store

UNSEEN = 10_000  # added to the seeds of pictures to learn from: none of them is evaluated


@dataclass
class Experiment:
    """One model and category below `folder`: `pictures/CONCEPT` to learn from, `images/WEIGHTS` to measure.

    Every prompt of the category, the watermarks and the blank one are drawn from `samples` seeds; `pictures` is the number
    of pictures to learn from, `sampling` holds ddim_steps, guidance_scale and batch_size.
    """

    model: TextToImage
    category: str
    folder: Path
    classifier: Classifier | None
    sampling: Mapping
    samples: int = 20
    pictures: int = 50
    inception: Path | None = None
    seed: int = 2024
    held_out: bool = False  # whether held-out templates are drawn too
    also: Sequence[str] = ()  # further prompts to draw
    _tables: dict[Path, pd.DataFrame] = field(default_factory=dict)

    def learn(self, store: Store, concepts: Sequence[Concept], protected: Sequence[int], given: Mapping,
              solution: Mapping | None = None) -> list[dict]:
        """The shifts of `concepts` by the method of `store`, those of SRS-ME protecting the concepts `protected`; what is
        there from the same inputs is kept. `solution` holds basis, tolerance, templates and always (default: the model's config)."""
        solution = solution or settings(self.model.base).solution
        if METHODS[store.method].null_space:
            for _ in solve(self.model, store, concepts, protected, solution["tolerance"], solution["basis"], solution["templates"],
                           solution["always"]):
                pass
        if METHODS[store.method].pictures and given["iter_break"]:
            for concept in concepts:
                cases = [replace(case, seed=case.seed + UNSEEN)
                         for case in seeded_cases([concept.prompt], self.pictures, self.seed)]
                self._draw(cases, self.folder / "pictures" / concept.name, self.model.drawn_by)
        return make_shifts(self.model, store, concepts, given, self.folder / "pictures")

    def images(self, shifts: Mapping[str, WeightShift], name: str) -> Path:
        """The folder of images by the base model with `shifts` merged: NAME and a digest of the shifts, or `ori`."""
        recipe = {"shifts": {label: shift.recipe for label, shift in shifts.items()}} | self.model.drawn_by  # before any merge
        digest = hashlib.sha256("".join(file_digest(shift.path) for shift in shifts.values()).encode()).hexdigest()[:8]
        folder = self.folder / "images" / (f"{name}-{digest}" if shifts else "ori")
        prompts = [*(concept.prompt for concept in load_concepts(self.category)), ""]
        if self.held_out:
            prompts += [template.format(concept.prompt) for concept in erasable(self.category) for template in concept.held_out]
        prompts = list(dict.fromkeys([*prompts, *self.also]))
        with applied(self.model.unet, list(shifts.values())):
            self._draw(seeded_cases(prompts, self.samples, self.seed), folder, recipe)
        return folder

    def measure(self, shifts: Mapping[str, WeightShift], name: str) -> tuple[pd.DataFrame, Path]:
        """`compare` of the original's images and those with `shifts`, and the folder of the latter."""
        folder, original = self.images(shifts, name), self.images({}, "")
        if folder not in self._tables:
            self._tables[folder] = compare(original, folder, folder / "prompts.csv", self.category, self.classifier,
                                           self.model.device, self.inception)
        return self._tables[folder].copy(), folder

    def _draw(self, cases: Sequence[Case], folder: Path, recipe: dict) -> None:
        generate_folder(self.model, cases, folder, recipe, 1, self.sampling["ddim_steps"],
                        self.sampling["guidance_scale"], self.sampling["batch_size"])
