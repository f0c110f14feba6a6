"""The probe of relearning: how fast does an edited model draw the concept again when it is fine-tuned on images?"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar

import torch
from torch import nn
from tqdm import tqdm

from ldm.config.concepts import Concept
from ldm.config.robustness import RelearningConfig
from ldm.diffusion.edits import replace_parameters
from ldm.diffusion.model import DiffusionModel
from ldm.diffusion.trainable import trainable_parameter_names
from ldm.experiments.attacks import NoisedImages, attack_digest, denoising_losses, encode_examples
from ldm.experiments.probe import UNEDITED, Bench, Finding, Subject
from ldm.experiments.unlearnt import UNLEARNT, Unlearnt
from ldm.io.images import image_filename, is_intact
from ldm.io.tensors import load_tensors, save_tensors

_FILE_TYPE = "weights while a concept is relearnt"
_MOMENTS = ("exp_avg", "exp_avg_sq")  # what AdamW keeps of each weight


@dataclass(frozen=True)
class Relearning:
    """Fine-tune on images of the concept under its name, and look at images of the name after some steps.

    The floor is the same of the unedited model with images of a concept that it never learnt, under an unknown name.
    """

    name: ClassVar[str] = "relearning"
    is_slow: ClassVar[bool] = True
    is_of_all: ClassVar[bool] = False
    config: RelearningConfig = field(default_factory=RelearningConfig)
    unlearnt_dir: Path | None = None  # images for the floor; woodcuts without it

    def measure(self, bench: Bench, subject: Subject, concept: Concept) -> list[Finding]:
        """Return the share of images that show the concept after each number of steps."""
        return self._findings(bench, subject, concept, bench.examples(concept, self.config.relearning_images))

    def floor(self, bench: Bench, concept: Concept) -> list[Finding]:
        """Return the shares of what the unedited model never learnt; the same for every concept."""
        unlearnt = Unlearnt.of(bench, self.config.relearning_images, self.unlearnt_dir)
        return self._findings(replace(bench, judge=unlearnt.judge), UNEDITED, UNLEARNT, unlearnt.examples)

    def _findings(self, bench: Bench, subject: Subject, concept: Concept, images: Sequence[Path]) -> list[Finding]:
        place = bench.place(subject, concept, f"relearning {attack_digest(self.config, bench.seed, images)}")
        cases = bench.cases([concept.prompt])
        paths: dict[int, list[Path]] = {}
        for steps in self.config.numbers:
            folder = place / f"{steps}-steps"
            paths[steps] = [folder / image_filename(case.case_number, 0) for case in cases]
        missing = [steps for steps, own in paths.items() if not all(path.is_file() and is_intact(path) for path in own)]
        state = place / "weights.safetensors"
        if missing:
            with bench.edited(subject):
                learner = _Learner(bench, concept, images, self.config)
                learner.resume(state, missing[0])
                for steps in missing:
                    learner.learn(steps, f"relearning by {subject.name}")
                    learner.save(state)
                    with learner.taught():
                        bench.generate_here(subject, paths[steps][0].parent, cases)
        state.unlink(missing_ok=True)  # of a run, too, that was stopped just before
        for own in paths.values():  # which nothing is added to by now: this checks what made them
            bench.generate_here(subject, own[0].parent, cases)
        return [bench.shown(f"{steps} steps of relearning", own, concept) for steps, own in paths.items()]


class _Learner:
    """The weights that are fine-tuned, beside those of the model as it is now, which stay."""

    def __init__(self, bench: Bench, concept: Concept, images: Sequence[Path], config: RelearningConfig):
        self.model: DiffusionModel = bench.model
        self.config, self.seed, self.steps = config, bench.seed, 0
        self.images = encode_examples(self.model, images)
        self.embeds = self.model.encode_prompt([concept.prompt])
        self.weights: dict[str, nn.Parameter] = {}
        for name in trainable_parameter_names(self.model.denoiser, config.relearning_train_method):
            self.weights[name] = nn.Parameter(self.model.denoiser.get_parameter(name).detach().clone())
        self.optimizer = torch.optim.AdamW(self.weights.values(), lr=config.relearning_lr)

    def taught(self) -> AbstractContextManager[None]:
        """While the block runs, let the model be as it was taught so far."""
        return replace_parameters(self.model.denoiser, self.weights)

    def learn(self, steps: int, title: str) -> None:
        """Go on until `steps` steps are done. What a step sees depends on its number alone."""
        for step in tqdm(range(self.steps, steps), desc=title, unit="step", initial=self.steps, total=steps):
            noised = NoisedImages.sample(self.model, self.images, self.config.relearning_batch_size, (self.seed, step))
            with self.taught():
                loss = denoising_losses(self.model, noised, self.embeds).sum()
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
        self.steps = steps

    def save(self, path: Path) -> None:
        """Keep what was learnt so far, with AdamW's moments."""
        tensors: dict[str, torch.Tensor] = {}
        for name, weight in self.weights.items():
            tensors |= {name: weight} | {f"{name} {part}": self.optimizer.state[weight][part] for part in _MOMENTS}
        save_tensors(path, tensors, _FILE_TYPE, {"done": self.steps})

    def resume(self, path: Path, most: int) -> None:
        """Go on from what a stopped run kept, where that is of at most `most` steps."""
        if not path.is_file():
            return
        tensors, metadata = load_tensors(path, _FILE_TYPE)
        if metadata["done"] > most:
            return
        self.steps = metadata["done"]
        for name, weight in self.weights.items():
            weight.data.copy_(tensors[name])
            moments = {part: tensors[f"{name} {part}"].to(weight) for part in _MOMENTS}
            self.optimizer.state[weight] = {"step": torch.tensor(float(self.steps)), **moments}
