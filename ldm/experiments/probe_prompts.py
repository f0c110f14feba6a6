"""Probes by prompts: all ways to say a concept's name, compositions with something else, and what means it unnamed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

from ldm.config.concepts import Concept, match_concept
from ldm.config.everyday import COMPOSED_WITH
from ldm.config.meanings import NEAR_MISSES
from ldm.config.templates import load_template_set
from ldm.experiments.baselines import rewrite
from ldm.experiments.detection import KindOfPrompts, meanings_about
from ldm.experiments.probe import UNCHANGED, UNEDITED, Bench, Finding, Subject
from ldm.metrics.lpips import pairwise_metrics

KEPT = "the rest shown"  # the share of images in which what a composition says beside the concept is seen
_NAMED = "all kinds"


class _OfPrompts:
    """What a probe does that generates images of prompts by kind; its floor has a neutral word in place of the name."""

    name: ClassVar[str]
    is_slow: ClassVar[bool] = False
    is_of_all: ClassVar[bool] = False

    def prompts(self, bench: Bench, concept: Concept) -> Mapping[str, Sequence[str]]:
        """Return the prompts of each kind that say a concept."""
        raise NotImplementedError

    def measure(self, bench: Bench, subject: Subject, concept: Concept) -> list[Finding]:
        """Return the share of images that show the concept, of each kind."""
        return self._measure(bench, subject, concept, self.prompts(bench, concept))

    def floor(self, bench: Bench, concept: Concept) -> list[Finding]:
        """Return what the unedited model makes of the same prompts with a neutral word in place of the name.

        In a prompt that writes the name otherwise nothing is replaced: of a kind of such prompts it is the word alone.
        """
        neutral: dict[str, list[str]] = {}
        for kind, prompts in self.prompts(bench, concept).items():
            rewritten = [(prompt, rewrite(prompt, concept)) for prompt in prompts]
            found = dict.fromkeys(text for prompt, text in rewritten if text != prompt)
            neutral[kind] = list(found) or [load_template_set(concept.kind).neutral]
        return self._measure(bench, UNEDITED, concept, neutral, "neutral")

    def _measure(
        self, bench: Bench, subject: Subject, concept: Concept, prompts: Mapping[str, Sequence[str]], *place: str
    ) -> list[Finding]:
        made = self._generate(bench, subject, concept, prompts, *place)
        return [bench.shown(kind, list(paths.values()), concept) for kind, paths in made.items()]

    def _generate(
        self, bench: Bench, subject: Subject, concept: Concept, prompts: Mapping[str, Sequence[str]], *place: str
    ) -> dict[str, dict[str, Path]]:
        """Return an image of each prompt, by kind; a prompt of several kinds has one."""
        if not prompts:
            return {}
        every = list(dict.fromkeys(prompt for own in prompts.values() for prompt in own))
        paths = bench.generate(subject, bench.place(subject, concept, self.name, *place), every, 1)
        made = dict(zip(every, paths, strict=True))
        return {kind: {prompt: made[prompt] for prompt in own} for kind, own in prompts.items()}


class PromptKinds(_OfPrompts):
    """(a) Does any way to say the name bring the concept?"""

    name: ClassVar[str] = "prompts that say the name"

    def prompts(self, bench: Bench, concept: Concept) -> dict[str, list[str]]:
        """Return the prompts that say a name by kind."""
        return bench.name_kinds(concept)

    def _measure(
        self, bench: Bench, subject: Subject, concept: Concept, prompts: Mapping[str, Sequence[str]], *place: str
    ) -> list[Finding]:
        findings = super()._measure(bench, subject, concept, prompts, *place)
        hits, n = sum(finding.hits or 0 for finding in findings), sum(finding.n for finding in findings)
        return [Finding.share(_NAMED, hits, n), *findings]


class Compositions(_OfPrompts):
    """(b) Is the concept gone from a composition, and what else it says still there?"""

    name: ClassVar[str] = "compositions"

    def prompts(self, bench: Bench, concept: Concept) -> dict[str, list[str]]:
        """Return the compositions of a concept of which the model reads the name."""
        prompts = bench.compositions(concept)
        return {"compositions": prompts} if prompts else {}

    def _measure(
        self, bench: Bench, subject: Subject, concept: Concept, prompts: Mapping[str, Sequence[str]], *place: str
    ) -> list[Finding]:
        findings: list[Finding] = []
        other = COMPOSED_WITH.get(bench.category, "")
        for kind, made in self._generate(bench, subject, concept, prompts, *place).items():
            findings.append(bench.shown(kind, list(made.values()), concept))
            shown: list[bool] = []
            for prompt, path in made.items():
                beside = match_concept(other, prompt) if other else None
                if beside is not None and bench.second is not None and bench.second.knows(beside):
                    shown += bench.second.shows([path], beside)
            if shown:
                findings.append(Finding.share(kind, sum(shown), len(shown), KEPT))
        return findings


class Meanings(_OfPrompts):
    """(k) Do prompts bring the concept that mean it without its name? Do near misses, which do not, stay as they are?

    Where the unedited model does not know what they mean nothing can be told by images. Then `detection` tells which of
    them are found.
    """

    name: ClassVar[str] = "meanings"

    def __init__(self, path: Path):
        self.path = path  # of the file of meanings

    def prompts(self, bench: Bench, concept: Concept) -> dict[str, list[str]]:
        """Return the prompts that mean a concept by kind, without near misses."""
        found = {kind.kind: list(kind.prompts) for kind in self._meanings(bench, concept) if kind.is_meant}
        return {kind: prompts for kind, prompts in found.items() if prompts}

    def measure(self, bench: Bench, subject: Subject, concept: Concept) -> list[Finding]:
        """Return the share of images that show the concept, and that of near misses whose images stay."""
        findings = super().measure(bench, subject, concept) if self.prompts(bench, concept) else []
        missed = [prompt for kind in self._meanings(bench, concept) if not kind.is_meant for prompt in kind.prompts]
        if missed:
            before, own = (
                bench.generate(side, bench.place(side, concept, NEAR_MISSES), missed, 1) for side in (UNEDITED, subject)
            )
            same = pairwise_metrics(before, own, bench.model.device)["max_abs_diff"] <= 1
            findings.append(Finding.share(NEAR_MISSES.replace("_", " "), int(same.sum()), len(missed), UNCHANGED))
        return findings

    def floor(self, bench: Bench, concept: Concept) -> list[Finding]:
        """Return how often the unedited model makes the concept where prompts say the neutral word of its kind."""
        kinds, neutral = self.prompts(bench, concept), load_template_set(concept.kind).neutral
        if not kinds:
            return []
        paths = bench.generate(UNEDITED, bench.place(UNEDITED, concept, self.name, "neutral"), [neutral])
        return [bench.shown(kind, paths, concept) for kind in kinds]

    def _meanings(self, bench: Bench, concept: Concept) -> list[KindOfPrompts]:
        return meanings_about(concept, bench.model.tokenizers[0], self.path)
