"""TODO experiments.experiment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
import hashlib
import pandas as pd
from pathlib import Path
from ldm.config.concepts import Concept, erasable_concepts, load_concepts
from ldm.config.models import load_model_config
from ldm.diffusion.model import DiffusionModel
from ldm.diffusion.sampling import generate_to_folder
from ldm.erasure.erase import erase_concepts, solve_null_spaces
from ldm.erasure.merge import applied
from ldm.erasure.methods import METHODS
from ldm.erasure.shift import WeightShift
from ldm.io.files import file_digest
from ldm.io.paths import ArtifactPaths
from ldm.io.prompts import PromptCase, make_cases
from ldm.metrics.classify import Classifier
from ldm.metrics.compare import compare


TRAIN_SEED_OFFSET = 10_000  # added to the seeds of pictures to learn from: none of them is evaluated


@dataclass
class Experiment:
    """One model and category below `folder`: `pictures/CONCEPT` to learn from, `images/WEIGHTS` to measure.

    Every prompt of the category, the watermarks and the blank one are drawn from `samples` seeds; `pictures` is the number
    of pictures to learn from, `sampling` holds ddim_steps, guidance_scale and batch_size.
    """

    model: DiffusionModel
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

    def learn(self, store: ArtifactPaths, concepts: Sequence[Concept], protected: Sequence[int], given: Mapping,
              solution: Mapping | None = None) -> list[dict]:
        """The shifts of `concepts` by the method of `store`, those of SRS-ME protecting the concepts `protected`; what is
        there from the same inputs is kept. `solution` holds basis, tolerance, templates and always (default: the model's config)."""
        solution = solution or load_model_config(self.model.base).solution
        if METHODS[store.method].null_space:
            for _ in solve_null_spaces(self.model, store, concepts, protected, solution["tolerance"], solution["basis"], solution["templates"],
                           solution["always"]):
                pass
        if METHODS[store.method].needs_images and given["iter_break"]:
            for concept in concepts:
                cases = [replace(case, seed=case.seed + TRAIN_SEED_OFFSET)
                         for case in make_cases([concept.prompt], self.needs_images, self.seed)]
                self._draw(cases, self.folder / "pictures" / concept.name, self.model.generation_metadata)
        return erase_concepts(self.model, store, concepts, given, self.folder / "pictures")

    def images(self, shifts: Mapping[str, WeightShift], name: str) -> Path:
        """The folder of images by the base model with `shifts` merged: NAME and a digest of the shifts, or `ori`."""
        recipe = {"shifts": {label: shift.metadata for label, shift in shifts.items()}} | self.model.generation_metadata  # before any merge
        digest = hashlib.sha256("".join(file_digest(shift.path) for shift in shifts.values()).encode()).hexdigest()[:8]
        folder = self.folder / "images" / (f"{name}-{digest}" if shifts else "ori")
        prompts = [*(concept.prompt for concept in load_concepts(self.category)), ""]
        if self.held_out:
            prompts += [template.format(concept.prompt) for concept in erasable_concepts(self.category) for template in concept.held_out]
        prompts = list(dict.fromkeys([*prompts, *self.also]))
        with applied(self.model.unet, list(shifts.values())):
            self._draw(make_cases(prompts, self.samples, self.seed), folder, recipe)
        return folder

    def measure(self, shifts: Mapping[str, WeightShift], name: str) -> tuple[pd.DataFrame, Path]:
        """`compare` of the original's images and those with `shifts`, and the folder of the latter."""
        folder, original = self.images(shifts, name), self.images({}, "")
        if folder not in self._tables:
            self._tables[folder] = compare(original, folder, folder / "prompts.csv", self.category, self.classifier,
                                           self.model.device, self.inception)
        return self._tables[folder].copy(), folder

    def _draw(self, cases: Sequence[PromptCase], folder: Path, recipe: dict) -> None:
        generate_to_folder(self.model, cases, folder, recipe, 1, self.sampling["ddim_steps"],
                        self.sampling["guidance_scale"], self.sampling["batch_size"])
