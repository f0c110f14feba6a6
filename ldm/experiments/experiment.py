"""What scenes, ablations and reports share: shifts, images and metrics of one model and category, each made once."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd

from ldm.config.concepts import (
    Concept,
    always_protected_prompts,
    erasable_concepts,
    get_concept,
    image_folder,
    load_concepts,
)
from ldm.config.everyday import COMPOSITIONS, sample_unprotected, split_compositions
from ldm.config.methods import MethodConfig, NullSpaceConfig, SamplingConfig
from ldm.config.models import load_model_config
from ldm.diffusion.image_folder import generate_to_folder
from ldm.diffusion.model import DiffusionModel
from ldm.erasure.erase import erase_concepts
from ldm.erasure.merge import by_form, edited, shifts_metadata
from ldm.erasure.protection import Protection, solve_null_spaces
from ldm.erasure.shift import WeightShift
from ldm.erasure.summary import ErasureSummary
from ldm.io.files import file_digest
from ldm.io.paths import ArtifactPaths
from ldm.io.prompts import PromptCase, make_cases
from ldm.metrics.classify import Classifier
from ldm.metrics.compare import compare

TRAIN_SEED_OFFSET = 10_000  # added to the seeds of training images: none of them is evaluated


@dataclass
class Experiment:
    """One model and category below `folder`: `training-images/CONCEPT` to train on, `images/WEIGHTS` to evaluate.

    `unprotected/WEIGHTS` has images of the prompts that nothing protects, `unprotected_prompts` of each group.

    Images of every prompt of the category, the watermarks, the empty prompt and `extra_prompts` are generated, of
    `seeds_per_prompt` seeds each; with `held_out` those of the held-out templates too. `num_training_images` is the
    number of images to train on for each concept. Where `only` names prompts, images of no others are made, each with
    the number and seed that it has among all.
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
    only: Collection[str] | None = None
    form: str = "linear"
    unprotected_prompts: int = 0
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
        model_config = load_model_config(self.model)
        null_space = null_space or model_config.null_space
        gate = model_config.gate.with_changes(gate=model_config.gate.gate and self.form == "gated")
        protected = [get_concept(self.category, index) for index in protected_indices]
        protection = Protection(protected, null_space)
        if config.solves_null_space:  # before any image, so that one without free dimensions costs none
            solve_null_spaces(self.model, artifacts, concepts, protection)
        image_dir = self.folder / "training-images"
        if config.trains_on_images:
            for concept in concepts:
                cases = make_cases([concept.prompt], self.num_training_images, self.seed)
                cases = [replace(case, seed=case.seed + TRAIN_SEED_OFFSET) for case in cases]
                self._generate(cases, image_folder(image_dir, concept), self.model.generation_metadata)
        return erase_concepts(self.model, artifacts, concepts, config, image_dir, gate=gate, preserve=protected)

    def generate(self, shifts: Mapping[str, WeightShift], name: str) -> Path:
        """Return the folder of images by the base model with `shifts` merged: `name` and their digest, or `ori`.

        Images that are there already are kept.
        """
        cases = make_cases(self._prompts(), self.seeds_per_prompt, self.seed)
        wanted = [case for case in cases if self.only is None or case.prompt in self.only]
        return self._generate_by(shifts, name, "images", wanted)

    def _generate_by(
        self, shifts: Mapping[str, WeightShift], name: str, subfolder: str, cases: Sequence[PromptCase]
    ) -> Path:
        metadata = {**shifts_metadata(shifts, self.form), **self.model.generation_metadata}  # taken before any merge
        digests = "".join(file_digest(Path(shift.path)) for shift in shifts.values())
        gated = "gated" if by_form(shifts, self.form)[0] else ""
        digest = hashlib.sha256(f"{digests}{gated}".encode()).hexdigest()[:8]
        folder = self.folder / subfolder / (f"{name}-{digest}" if shifts else "ori")
        with edited(self.model, shifts, self.form):
            self._generate(cases, folder, metadata)
        return folder

    def evaluate(self, shifts: Mapping[str, WeightShift], name: str) -> tuple[pd.DataFrame, Path]:
        """Return `compare` of the original's images and those with `shifts`, and the folder of the latter."""
        folder, original = self.generate(shifts, name), self.generate({}, "")
        table = self._compare(original, folder)
        if self.only is not None:  # of another run there may be more
            table = table[table["prompt"].isin(list(self.only))].reset_index(drop=True)
        return table, folder

    def evaluate_cases(
        self, shifts: Mapping[str, WeightShift], name: str, subfolder: str, cases: Sequence[PromptCase]
    ) -> tuple[pd.DataFrame, Path]:
        """Return what `evaluate` does, of images of other cases, which are kept in SUBFOLDER/NAME-DIGEST."""
        original = self._generate_by({}, "", subfolder, cases)
        folder = self._generate_by(shifts, name, subfolder, cases)
        return self._compare(original, folder), folder

    def evaluate_unprotected(
        self, shifts: Mapping[str, WeightShift], name: str, erased: Collection[int]
    ) -> pd.DataFrame:
        """Return `compare` of the images of prompts that nothing protects, and in `status` the group of each prompt.

        The table is empty where no such prompts are asked for. `erased` are the indexes of the concepts that `shifts`
        erase: compositions that say one of them are a group of their own.
        """
        statuses: dict[str, str] = {}
        for group, prompts in self.unprotected_groups(erased).items():
            statuses |= dict.fromkeys(prompts, group)
        if not statuses:
            return pd.DataFrame()
        cases = _unprotected_cases(self._sample_unprotected(), self.seed)
        original = self._generate_by({}, "", "unprotected", cases)
        table = self._compare(original, self._generate_by(shifts, name, "unprotected", cases))
        table = table[table["prompt"].isin(list(statuses))].reset_index(drop=True)  # of another run there may be more
        table.insert(0, "status", [statuses[prompt] for prompt in table["prompt"]])
        says_concept = table["status"].str.endswith(COMPOSITIONS)
        for column in ("accuracy_before", "accuracy_after"):  # a fillet of pollock is no Jackson Pollock
            table[column] = table[column].where(says_concept)
        return table

    def unprotected_groups(self, erased: Collection[int]) -> dict[str, list[str]]:
        """Return the prompts of each group that nothing protects, compositions that say an `erased` concept apart."""
        return split_compositions(self.category, self._sample_unprotected(), erased)

    def _sample_unprotected(self) -> dict[str, list[str]]:
        protected = [*always_protected_prompts(), *self.extra_prompts]
        return sample_unprotected(self.category, self.unprotected_prompts, protected)

    def _compare(self, original: Path, edited_dir: Path) -> pd.DataFrame:
        if edited_dir not in self._tables:
            self._tables[edited_dir] = compare(
                original,
                edited_dir,
                edited_dir / "prompts.csv",
                self.category,
                self.classifier,
                self.model.device,
                self.inception_weights,
            )
        return self._tables[edited_dir].copy()

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


def _unprotected_cases(prompts: Mapping[str, Sequence[str]], seed: int) -> list[PromptCase]:
    """Return a case for each prompt of each group: its number and seed stay where there are more prompts."""
    cases: list[PromptCase] = []
    for number, members in enumerate(prompts.values()):
        rng = random.Random(f"{seed} {number}")
        cases += [PromptCase(p, rng.randrange(3000), 1000 * number + k) for k, p in enumerate(members)]
    return cases
