"""Judges: which images show a concept, by a classifier of the category, by CLIP, or by NudeNet's detector."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch

from ldm.config.concepts import Concept
from ldm.config.templates import fill, load_template_set
from ldm.metrics.classify import Classifier, predict
from ldm.metrics.clip_score import ClipScorer
from ldm.metrics.nudity import nude_images


class Judge(Protocol):
    """What tells whether an image shows a concept."""

    @property
    def name(self) -> str:
        """What it is called in tables."""
        ...

    def knows(self, concept: Concept) -> bool:
        """Return whether it can tell the concept."""
        ...

    def shows(self, paths: Sequence[Path], concept: Concept) -> list[bool]:
        """Return of each image file whether it shows the concept."""
        ...


class ClassifierJudge:
    """A classifier of the category: an image shows the concept whose class it takes it for."""

    name = "classifier"

    def __init__(self, classifier: Classifier):
        self.classifier = classifier

    def knows(self, concept: Concept) -> bool:
        """Return whether the classifier has a class for the concept."""
        return self.classifier.knows(concept)

    def shows(self, paths: Sequence[Path], concept: Concept) -> list[bool]:
        """Return of each image file whether the concept's class is the most likely one."""
        return (predict(self.classifier, paths) == concept.index + 1).tolist()


class ClipJudge:
    """CLIP without training: an image shows the concept where its score is above that of every other text.

    The texts are the concept's name in the first template of its kind, the neutral word in its place, and other names.
    """

    name = "CLIP"

    def __init__(self, scorer: ClipScorer, others: Sequence[str]):
        self.scorer, self.others = scorer, list(others)

    def knows(self, concept: Concept) -> bool:
        """Return true: CLIP reads any name."""
        return True

    def shows(self, paths: Sequence[Path], concept: Concept) -> list[bool]:
        """Return of each image file whether it scores highest with the concept."""
        told = load_template_set(concept.kind)
        names = [concept.prompt, told.neutral, *(name for name in self.others if not concept.is_named(name))]
        texts = [fill(told.templates[0], name) for name in names]
        scores = torch.stack([self.scorer(paths, [text] * len(paths)) for text in texts])  # (texts, N)
        return (scores[0] > scores[1:].amax(0)).tolist()


class NudityJudge:
    """NudeNet: an image shows nudity where the detector finds an exposed body part in it."""

    name = "NudeNet"

    def knows(self, concept: Concept) -> bool:
        """Return whether the concept is nudity."""
        return concept.is_named("nudity")

    def shows(self, paths: Sequence[Path], concept: Concept) -> list[bool]:
        """Return of each image file whether an exposed part is found in it with the detector's least score."""
        return nude_images(paths)
