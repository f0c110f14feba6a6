"""Soft prompts: a few vectors learnt so that the edited model makes the concept of which the attacker has images.

Textual inversion (Gal et al., arXiv 2208.01618) against erased models (Pham et al., arXiv 2308.01508).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import ClassVar

import torch
from tqdm import tqdm

from ldm.config.concepts import Concept
from ldm.config.robustness import SoftPromptConfig
from ldm.diffusion.batches import States
from ldm.diffusion.edits import edit_embeddings
from ldm.diffusion.latents import denoising_batches
from ldm.diffusion.model import DiffusionModel
from ldm.diffusion.soft_tokens import Placeholders, find_placeholders, soft_tokens
from ldm.erasure.gated_edit import GatedPrompts
from ldm.erasure.merge import by_form
from ldm.erasure.training import LossOutput, training_loop
from ldm.experiments.probe import AGAINST_GATE, UNEDITED, Bench, Finding, Subject
from ldm.experiments.unlearnt import UNLEARNT, Unlearnt
from ldm.io.files import file_digest
from ldm.io.images import load_batch
from ldm.io.tensors import load_tensors, save_tensors
from ldm.metrics.frechet import extract_features

_FILE_TYPE, _FILE = "soft prompt", "soft-prompt.safetensors"
_TRIAL_SEEDS = 30_000  # added to those of the images that are judged
_TRIALS = 4  # images by which a soft prompt is chosen among those that are learnt
_FIRST_SPREAD = 0.1  # of first vectors about the mean of the vocabulary, in its standard deviations
_Batch = tuple[torch.Tensor, torch.Tensor]  # noised latents (N, ...) and timesteps (N,)


class _Watched:
    """What gates make of prompts' embeddings, and how far above its threshold the nearest of them was, (N, edits)."""

    def __init__(self, edit: GatedPrompts):
        self._edit, self.margins = edit, torch.empty(0)

    @property
    def layers(self) -> Mapping[str, Collection[int]]:
        """The hidden states that the gates read, by text encoder."""
        return self._edit.layers

    def __call__(self, prompt_embeds: torch.Tensor, states: States) -> torch.Tensor:
        self.margins = self._edit.margins(states)
        return self._edit(prompt_embeds, states)


class SoftPromptLoss:
    """The denoising loss under a prompt of soft tokens; against gates with a hinge, `relu(margin + clearance)` of each.

    A gate decides without a gradient. Where it fires its map acts, and the gradient goes through that.
    """

    def __init__(self, model: DiffusionModel, words: Placeholders, config: SoftPromptConfig, evades: bool = False):
        """`evades` asks for the hinge. It is for a model that is edited as it will be attacked."""
        self.model, self.words, self.config = model, words, config
        edit = model.embedding_edit
        self.watched = _Watched(edit) if evades and isinstance(edit, GatedPrompts) else None
        generator = torch.Generator().manual_seed(config.soft_seed)
        self._spreads, self._means = dict[str, torch.Tensor](), dict[str, torch.Tensor]()
        self._offsets: dict[str, torch.Tensor] = {}
        for name, encoder in model.text_encoders.items():
            vocabulary = encoder.get_input_embeddings().weight.detach()
            first = _FIRST_SPREAD * torch.randn(len(words.ids[name]), vocabulary.shape[1], generator=generator)
            self._means[name], self._spreads[name] = vocabulary.float().mean(0), vocabulary.float().std()
            self._offsets[name] = first.to(vocabulary.device).requires_grad_()

    @property
    def vectors(self) -> dict[str, torch.Tensor]:
        """The soft tokens (k, width) by text encoder."""
        return {name: self._means[name] + self._spreads[name] * own for name, own in self._offsets.items()}

    def parameters(self) -> list[torch.Tensor]:
        """Return what is learnt: the distances from the mean of the vocabulary, in its standard deviations."""
        return list(self._offsets.values())

    def __call__(self, noised: _Batch, target: torch.Tensor) -> LossOutput:
        """Return the loss of noised latents at timesteps, of which the denoiser should predict `target` (N, ...)."""
        latents, timestep = noised
        edit = self.model.embedding_edit if self.watched is None else self.watched
        with soft_tokens(self.model, self.words, self.vectors), edit_embeddings(self.model, edit):
            rows = self.model.embed([self.words.prompt])
        output = self.model.denoiser_output(latents, timestep, rows.expand(len(latents), -1, -1))
        error = (output - target.float()).square().mean()
        if self.watched is None:
            return LossOutput(error, error)
        lacking = (self.watched.margins + self.config.soft_clearance).relu().sum().to(error)
        return LossOutput(error + self.config.soft_gate_weight * lacking, error)


def learn_soft_prompt(
    model: DiffusionModel, examples: Sequence[Path], words: Placeholders, config: SoftPromptConfig, evades: bool = False
) -> dict[str, torch.Tensor]:
    """Return vectors (k, width) by text encoder, learnt on image files by the model as it is edited now."""
    loss = SoftPromptLoss(model, words, config, evades)
    latents = model.encode_image(load_batch(examples, model.image_size))
    first = int(config.soft_first_timestep * model.num_train_timesteps)
    batches = denoising_batches(model, latents, config.soft_batch_size, config.soft_seed, first)
    pairs = (((noised, timestep), target) for noised, timestep, target in batches)
    steps = islice(training_loop(loss, pairs, config.soft_lr), config.soft_steps)
    for _ in tqdm(steps, total=config.soft_steps, desc="soft prompt", unit="iteration", leave=False):
        pass
    return {name: vectors.detach() for name, vectors in loss.vectors.items()}


@dataclass
class SoftPrompts:
    """The probe: of each number of tokens one soft prompt, and one more against the gates where any act."""

    name: ClassVar[str] = "soft prompts"
    is_slow: ClassVar[bool] = True
    is_of_all: ClassVar[bool] = False

    config: SoftPromptConfig = field(default_factory=SoftPromptConfig)
    numbers: Sequence[int] = (1, 3)
    unlearnt_dir: Path | None = None  # a user's own images of what the model never learnt

    def measure(self, bench: Bench, subject: Subject, concept: Concept) -> list[Finding]:
        """Return in how many images by each soft prompt the judge sees the concept."""
        examples = bench.examples(concept, self.config.soft_examples)
        found: list[Finding] = []
        for number in self.numbers:
            found.append(bench.shown(_kind(number), self._images(bench, subject, concept, examples, number), concept))
            if by_form(subject.shifts, subject.form)[0]:
                images = self._images(bench, subject, concept, examples, number, evades=True)
                found.append(bench.shown(f"{_kind(number)}{AGAINST_GATE}", images, concept))
        return found

    def floor(self, bench: Bench, concept: Concept) -> list[Finding]:
        """Return in how many images of the unedited model by each soft prompt what it never learnt is seen."""
        unlearnt = Unlearnt.of(bench, self.config.soft_examples, self.unlearnt_dir)
        examples = unlearnt.examples
        found: list[Finding] = []
        for number in self.numbers:
            seen = unlearnt.judge.shows(self._images(bench, UNEDITED, UNLEARNT, examples, number), UNLEARNT)
            found.append(Finding.share(_kind(number), sum(seen), len(seen)))
        return found

    def _images(
        self,
        bench: Bench,
        subject: Subject,
        concept: Concept,
        examples: Sequence[Path],
        number: int,
        evades: bool = False,
    ) -> list[Path]:
        """Return images of a subject by a soft prompt of a number of tokens; what is there is not learnt again.

        Of several that are learnt that one is taken whose images have features most like the examples', by their means.
        """
        model, words = bench.model, find_placeholders(bench.model, number)
        inputs = [
            self.config.to_dict(),
            words.prompt,
            evades,
            model.digest,
            subject.folder,
            *map(file_digest, examples),
        ]
        metadata = {"learnt_from": hashlib.sha256(json.dumps(inputs).encode()).hexdigest()}
        place = bench.place(subject, concept, "soft prompts", f"{number} {metadata['learnt_from'][:8]}")
        aim = extract_features(examples, model.device).mean(0)
        cases = bench.cases([words.prompt])
        trials = [replace(case, seed=case.seed + _TRIAL_SEEDS) for case in cases[:_TRIALS]]
        found: dict[Path, float] = {}
        with bench.edited(subject):
            for restart in range(self.config.soft_restarts):
                folder = place / str(restart)
                if not (folder / _FILE).is_file():
                    config = self.config.with_changes(soft_seed=self.config.soft_seed + restart)
                    vectors = learn_soft_prompt(model, examples, words, config, evades)
                    save_tensors(folder / _FILE, vectors, _FILE_TYPE, metadata | {"words": words.prompt})
                with soft_tokens(model, words, load_tensors(folder / _FILE, _FILE_TYPE)[0]):
                    tried = bench.generate_here(subject, folder / "trials", trials)
                found[folder] = float((extract_features(tried, model.device).mean(0) - aim).norm())
            nearest = min(found, key=found.__getitem__)
            with soft_tokens(model, words, load_tensors(nearest / _FILE, _FILE_TYPE)[0]):
                return bench.generate_here(subject, nearest / "images", cases)


def _kind(number: int) -> str:
    return f"{number} token{'s' if number > 1 else ''}"
