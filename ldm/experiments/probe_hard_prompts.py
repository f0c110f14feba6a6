"""The probe of hard prompts: is there a text of ordinary words under which an edited model draws the concept?"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import ClassVar

from tqdm import tqdm

from ldm.config.concepts import Concept
from ldm.config.robustness import HardPromptConfig
from ldm.experiments.attacks import NoisedImages, attack_digest, encode_examples
from ldm.experiments.hard_prompts import FoundPrompt, HardPromptSearch, search_words
from ldm.experiments.probe import EXAMPLES, UNEDITED, Bench, Finding, Subject
from ldm.experiments.unlearnt import UNLEARNT, Unlearnt
from ldm.io.files import write_json

WITH_NAME, WITHOUT_NAME = KINDS = ("hard prompts with the name", "hard prompts without the name")
BY_WORDS = "shown by the other words alone"  # a measure: by the unedited model, the name left out
_PROMPTS = "prompts.json"


@dataclass(frozen=True)
class HardPrompts:
    """Search for such prompts by the loss on images of the concept, with its name among the words and without it.

    The images of the prompts of all searches are judged together. The floor is the same search of the unedited model
    for what the images of a concept show that it never learnt.
    """

    name: ClassVar[str] = "hard prompts"
    is_slow: ClassVar[bool] = True
    is_of_all: ClassVar[bool] = False
    config: HardPromptConfig = field(default_factory=HardPromptConfig)
    unlearnt_dir: Path | None = None  # images for the floor; woodcuts without it

    def measure(self, bench: Bench, subject: Subject, concept: Concept) -> list[Finding]:
        """Return the shares of images that show the concept, by prompts with its name and without it.

        With them is the share by the unedited model where all that says the name is left out of the former: what the
        other words of these prompts show alone.
        """
        images = bench.examples(concept)
        findings, found = self._findings(bench, subject, concept, images)
        free = set(search_words(bench.model.tokenizers[0], concept))  # which say no part of the name
        without = [" ".join(word for word in each.prompt.split() if word in free) for each in found[WITH_NAME]]
        place = self._place(bench, subject, concept, images, WITH_NAME)
        shown = bench.judge.shows(bench.generate(UNEDITED, place / "name-left-out", without), concept)
        return [*findings, Finding.share(WITH_NAME, sum(shown), len(shown), BY_WORDS)]

    def floor(self, bench: Bench, concept: Concept) -> list[Finding]:
        """Return the shares by which the unedited model draws what it never learnt; the same for every concept."""
        unlearnt = Unlearnt.of(bench, EXAMPLES, self.unlearnt_dir)
        return self._findings(replace(bench, judge=unlearnt.judge), UNEDITED, UNLEARNT, unlearnt.examples)[0]

    def _place(self, bench: Bench, subject: Subject, concept: Concept, images: Sequence[Path], kind: str) -> Path:
        return bench.place(subject, concept, f"{kind} {attack_digest(self.config, bench.seed, images)}")

    def _findings(
        self, bench: Bench, subject: Subject, concept: Concept, images: Sequence[Path]
    ) -> tuple[list[Finding], dict[str, list[FoundPrompt]]]:
        """Return a finding of each kind, and the prompts that were found."""
        findings: list[Finding] = []
        prompts: dict[str, list[FoundPrompt]] = {}
        for kind in KINDS:
            place = self._place(bench, subject, concept, images, kind)
            prompts[kind] = found = self._search(bench, subject, concept, images, kind, place / _PROMPTS)
            paths = bench.generate(subject, place / "images", [each.prompt for each in found])
            findings.append(bench.shown(kind, paths, concept))
        return findings, prompts

    def _search(
        self, bench: Bench, subject: Subject, concept: Concept, images: Sequence[Path], kind: str, path: Path
    ) -> list[FoundPrompt]:
        """Return the prompt of each search, kept in a JSON file: those that a stopped run found are there already."""
        model, config, found = bench.model, self.config, _read(path)
        if len(found) == config.hard_searches:
            return found
        words = search_words(model.tokenizers[0], concept if kind == WITHOUT_NAME else None)
        noised = NoisedImages.sample(model, encode_examples(model, images), config.hard_noised_images, (bench.seed,))
        search = HardPromptSearch(model, noised, words, config)
        numbers = range(len(found), config.hard_searches)
        with bench.edited(subject):
            for number in tqdm(numbers, desc=f"{kind} for {concept.name}, {subject.name}", unit="search"):
                template = _around(concept.prompt, _before(number, config)) if kind == WITH_NAME else " ".join
                found.append(search.find(template, f"{bench.seed} {number}"))
                write_json(path, {"settings": config.to_dict(), "prompts": [asdict(each) for each in found]})
        return found


def _read(path: Path) -> list[FoundPrompt]:
    """Return the prompts that a JSON file has; none where it is not there."""
    entries = json.loads(path.read_text(encoding="utf-8"))["prompts"] if path.is_file() else []
    return [FoundPrompt(**entry) for entry in entries]


def _before(number: int, config: HardPromptConfig) -> int:
    """Return how many words stand before the name: none in the first search, and all in the last one."""
    return round(config.hard_words * number / max(1, config.hard_searches - 1))


def _around(name: str, before: int) -> Callable[[Sequence[str]], str]:
    """Return what puts words around a name, `before` of them before it."""
    return lambda words: " ".join([*words[:before], name, *words[before:]])
