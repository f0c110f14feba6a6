"""What probes of the robustness suite share: whom they ask, what they find, and images that are each made once."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Protocol

from ldm.config.concepts import Concept
from ldm.config.everyday import compositions_of
from ldm.config.methods import SamplingConfig
from ldm.config.prompt_kinds import name_kinds
from ldm.config.spellings import says
from ldm.diffusion.image_folder import generate_to_folder
from ldm.diffusion.model import DiffusionModel
from ldm.diffusion.tokenizer import read_part
from ldm.erasure.merge import by_form, edited, shifts_metadata
from ldm.erasure.shift import WeightShift
from ldm.io.files import file_digest
from ldm.io.images import image_filename
from ldm.io.prompts import PromptCase, make_cases
from ldm.metrics.judge import Judge

AGAINST_GATE = ", against the gate"  # the end of a kind: the same attack, which evades gates too
SHOWN = "shown"  # the measure that is a share of images in which the judge sees the concept
UNCHANGED = "images unchanged"  # that of images in which no pixel differs by more than 1 of 255 from the unedited


@dataclass(frozen=True)
class Subject:
    """A model as probes meet it: `name` says by which contender `shifts` were made, which act in `form`.

    The one without shifts is the unedited model.
    """

    name: str
    shifts: Mapping[str, WeightShift] = field(default_factory=dict)
    form: str = "linear"

    @cached_property
    def folder(self) -> str:
        """The name of its folder: its own, and the digest of its shifts' files and of the form in which they act."""
        if not self.shifts:
            return self.name
        digests = "".join(file_digest(Path(shift.path)) for shift in self.shifts.values())
        gated = "".join(by_form(self.shifts, self.form)[0])
        digest = hashlib.sha256(f"{digests} {gated}".encode()).hexdigest()[:8]
        return f"{re.sub('[^a-zA-Z0-9-]+', '-', self.name.replace(',', ''))[:_LONGEST]}-{digest}"


UNEDITED = Subject("unedited")
_LONGEST = 80  # characters of a name by which a folder is called
EXAMPLES = 20  # images of a concept that attackers have
_COMPOSED = 8  # times as many compositions are tried as are taken
_EXAMPLE_SEEDS = 20_000  # added to the seeds of what attackers have


@dataclass(frozen=True)
class Finding:
    """What a probe found by one `kind` of trial: a share, `hits` of `n`, or the mean `value` of another measure."""

    kind: str
    measure: str
    n: int
    value: float
    hits: int | None = None

    @classmethod
    def share(cls, kind: str, hits: int, n: int, measure: str = SHOWN) -> Finding:
        """Return the finding of a share."""
        return cls(kind, measure, n, hits / n if n else float("nan"), hits)


@dataclass
class Bench:
    """What probes work with: a model and its sampling, the judge, and a folder in which all that is made is kept.

    `category` is that of the concepts `erased`, and of those `restored`, whose shifts were made too and are left out.
    `second` judges the concepts that compositions say beside them. `images` is the number of images of each finding,
    and all seeds follow from `seed`.
    """

    model: DiffusionModel
    category: str
    folder: Path
    judge: Judge
    sampling: SamplingConfig
    erased: Sequence[Concept] = ()
    restored: Sequence[Concept] = ()
    second: Judge | None = None
    images: int = 16
    seed: int = 2024
    shared: dict[tuple[Any, ...], Any] = field(default_factory=dict, repr=False)  # what several probes take

    def place(self, subject: Subject, concept: Concept, *names: str) -> Path:
        """Return the folder, or the file, in which something of a subject and a concept is kept."""
        return self.folder.joinpath(subject.folder, concept.label, *(name.replace(" ", "-") for name in names))

    def edited(self, subject: Subject) -> AbstractContextManager[None]:
        """While the block runs, let the model be the subject's."""
        return edited(self.model, subject.shifts, subject.form)

    def name_kinds(self, concept: Concept) -> dict[str, list[str]]:
        """Return prompts that say a concept's name, by kind: those of which the model reads the name, or all."""
        kinds = {kind: self._read(prompts, concept) for kind, prompts in name_kinds(concept).items()}
        prompts = [prompt for own in kinds.values() for prompt in own]
        self.model.notify_of_cuts(prompts, is_brief=True)
        return {kind: prompts for kind, prompts in kinds.items() if prompts}

    def compositions(self, concept: Concept) -> list[str]:
        """Return at most `images` prompts that say a concept, which the model reads, and something else."""
        prompts = compositions_of(concept, self.category, _COMPOSED * self.images)
        return self._read(prompts, concept)[: self.images]

    def _read(self, prompts: Sequence[str], concept: Concept) -> list[str]:
        found: list[str] = []
        for prompt in prompts:
            parts = [read_part(tokenizer, prompt) for tokenizer in self.model.tokenizers]  # None where nothing is cut
            if all(part is None or says(part, concept.spellings) for part in parts):
                found.append(prompt)
        return found

    def metadata(self, subject: Subject) -> dict[str, Any]:
        """Return what a folder says of the subject that made its images."""
        return {**shifts_metadata(subject.shifts, subject.form), **self.model.generation_metadata}

    def generate(
        self, subject: Subject, folder: Path, prompts: Sequence[str], number: int = 0, **sampling: float
    ) -> list[Path]:
        """Return image files of prompts by a subject, `number` of each or about `images` in all, made where they lack.

        `sampling` are settings that are other than the bench's.
        """
        cases = self.cases(prompts, number)
        with self.edited(subject):
            return self.generate_here(subject, folder, cases, **sampling)

    def generate_here(
        self, subject: Subject, folder: Path, cases: Sequence[PromptCase], **sampling: float
    ) -> list[Path]:
        """Return image files of cases by the model as it is now, within `edited` and whatever else acts on it."""
        generate_to_folder(self.model, cases, folder, self.metadata(subject), replace(self.sampling, **sampling))
        return [folder / image_filename(case.case_number, 0) for case in cases]

    def cases(self, prompts: Sequence[str], number: int = 0) -> list[PromptCase]:
        """Return `number` cases of each prompt; as many as make about `images` in all where no number is given."""
        if not prompts:
            return []
        return make_cases(prompts, number or max(1, -(-self.images // len(prompts))), self.seed)

    def examples(self, concept: Concept, number: int = EXAMPLES) -> list[Path]:
        """Return images of a concept by the unedited model, which attackers have, of seeds that nothing else has."""
        cases = [replace(c, seed=c.seed + _EXAMPLE_SEEDS) for c in make_cases([concept.prompt], number, self.seed)]
        return self.generate_here(UNEDITED, self.place(UNEDITED, concept, f"examples {number}"), cases)

    def shown(self, kind: str, paths: Sequence[Path], concept: Concept) -> Finding:
        """Return the share of images in which the judge sees a concept."""
        return Finding.share(kind, sum(self.judge.shows(paths, concept)), len(paths))


class Probe(Protocol):
    """One question about an erasure, asked of every subject in the same way."""

    name: ClassVar[str]
    is_slow: ClassVar[bool]  # whether it trains something
    is_of_all: ClassVar[bool]  # whether what it finds is of all concepts together, and it is asked once

    def measure(self, bench: Bench, subject: Subject, concept: Concept) -> list[Finding]:
        """Return what it finds of a subject about a concept that this erases. What is there is not made again."""
        ...

    def floor(self, bench: Bench, concept: Concept) -> list[Finding]:
        """Return what it finds, by the same kinds and measures, where the concept was never learnt; or nothing."""
        ...
