"""What scenes, ablations and reports share: shifts, images and metrics of one model and category, each made once."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd

from ldm.config.concepts import Concept, erasable_concepts, load_concepts
from ldm.config.methods import MethodConfig, NullSpaceConfig, SamplingConfig
from ldm.config.models import load_model_config
from ldm.diffusion.image_folder import generate_to_folder
from ldm.diffusion.model import DiffusionModel
from ldm.erasure.erase import ErasureSummary, erase_concepts
from ldm.erasure.merge import by_form, edited, shifts_metadata
from ldm.erasure.protection import Protection, solve_null_spaces
from ldm.erasure.shift import WeightShift
from ldm.io.files import file_digest
from ldm.io.paths import ArtifactPaths
from ldm.io.prompts import PromptCase, make_cases
from ldm.metrics.classify import Classifier
from ldm.metrics.compare import compare

TRAIN_SEED_OFFSET = 10_000  # added to the seeds of training images: none of them is evaluated


@dataclass
class Experiment:
    """One model and category below `folder`: `training-images/CONCEPT` to train on, `images/WEIGHTS` to evaluate.

    Images of every prompt of the category, the watermarks, the empty prompt and `extra_prompts` are generated, of
    `seeds_per_prompt` seeds each; with `held_out` those of the held-out templates too. `num_training_images` is the
    number of images to train on for each concept.
    """

    model: DiffusionModel
    category: str
    folder: Path
    classifier: Classifier | None
    sampling: SamplingConfig
    seeds_per_prompt: int = 20
    num_training_images: int = 50
    inception_weights: Path | None = None
    seed: int = 2024
    held_out: bool = False
    extra_prompts: Sequence[str] = ()
    form: str = "linear"
    _tables: dict[Path, pd.DataFrame] = field(default_factory=dict)

    def erase(
        self,
        artifacts: ArtifactPaths,
        concepts: Sequence[Concept],
        protected_indices: Sequence[int],
        config: MethodConfig,
        null_space: NullSpaceConfig | None = None,
    ) -> list[ErasureSummary]:
        """Make the shifts of `concepts`, which protect the concepts `protected_indices` where the method can protect.

        What is there from the same inputs is kept. `null_space` is that of the model's config if it is not given.

        Raises ValueError when the protected prompts leave no free dimensions.
        """
        model_config = load_model_config(self.model.config_name)
        null_space = null_space or model_config.null_space
        gate = model_config.gate.with_changes(gate=model_config.gate.gate and self.form == "gated")
        protection = Protection(protected_indices, null_space)
        if config.needs_null_space:  # before any image, so that one without free dimensions costs none
            solve_null_spaces(self.model, artifacts, concepts, protection)
        image_dir = self.folder / "training-images"
        if config.trains_on_images:
            for concept in concepts:
                cases = make_cases([concept.prompt], self.num_training_images, self.seed)
                cases = [replace(case, seed=case.seed + TRAIN_SEED_OFFSET) for case in cases]
                self._generate(cases, image_dir / concept.name, self.model.generation_metadata)
        return erase_concepts(self.model, artifacts, concepts, config, image_dir, gate=gate)

    def generate(self, shifts: Mapping[str, WeightShift], name: str) -> Path:
        """Return the folder of images by the base model with `shifts` merged: `name` and their digest, or `ori`.

        Images that are there already are kept.
        """
        metadata = {**shifts_metadata(shifts, self.form), **self.model.generation_metadata}  # taken before any merge
        digests = "".join(file_digest(Path(shift.path)) for shift in shifts.values())
        gated = "gated" if by_form(shifts, self.form)[0] else ""
        digest = hashlib.sha256(f"{digests}{gated}".encode()).hexdigest()[:8]
        folder = self.folder / "images" / (f"{name}-{digest}" if shifts else "ori")
        with edited(self.model, shifts, self.form):
            self._generate(make_cases(self._prompts(), self.seeds_per_prompt, self.seed), folder, metadata)
        return folder

    def evaluate(self, shifts: Mapping[str, WeightShift], name: str) -> tuple[pd.DataFrame, Path]:
        """Return `compare` of the original's images and those with `shifts`, and the folder of the latter."""
        folder, original = self.generate(shifts, name), self.generate({}, "")
        if folder not in self._tables:
            self._tables[folder] = compare(
                original,
                folder,
                folder / "prompts.csv",
                self.category,
                self.classifier,
                self.model.device,
                self.inception_weights,
            )
        return self._tables[folder].copy(), folder

    def _prompts(self) -> list[str]:
        """Return the prompts to evaluate, once each."""
        prompts = [concept.prompt for concept in load_concepts(self.category)]
        prompts.append("")
        if self.held_out:
            for concept in erasable_concepts(self.category):
                prompts += concept.held_out_prompts
        return list(dict.fromkeys([*prompts, *self.extra_prompts]))

    def _generate(self, cases: Sequence[PromptCase], folder: Path, metadata: Mapping[str, Any]) -> None:
        generate_to_folder(self.model, cases, folder, metadata, self.sampling)
