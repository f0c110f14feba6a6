"""Judges: which images show a concept, by a classifier, by CLIP, by NudeNet's detector, or by examples."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, Self

import torch

from ldm.config.concepts import Concept
from ldm.config.templates import fill, load_template_set
from ldm.metrics.classify import Classifier, predict
from ldm.metrics.clip_score import ClipScorer
from ldm.metrics.frechet import extract_features
from ldm.metrics.nudity import load_detector, nude_images

_JUDGE_RIDGE = 0.1  # of the discriminant, relative to the mean variance of a feature
_FARTHEST = 0.02  # of held-back images, that may be on the other side of the threshold


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
    """Classifiers: an image shows the concept whose class the first that knows it takes the image for."""

    name = "classifier"

    def __init__(self, *classifiers: Classifier):
        self.classifiers = classifiers

    def knows(self, concept: Concept) -> bool:
        """Return whether a classifier has a class for the concept."""
        return any(classifier.knows(concept) for classifier in self.classifiers)

    def shows(self, paths: Sequence[Path], concept: Concept) -> list[bool]:
        """Return of each image file whether the concept's class is the most likely one."""
        classifier = next(each for each in self.classifiers if each.knows(concept))
        return (predict(classifier, paths) == classifier.class_of(concept)).tolist()


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
        scores = self.scorer.with_each(paths, texts)  # (N, texts)
        return (scores[:, 0] > scores[:, 1:].amax(1)).tolist()


class NudityJudge:
    """NudeNet: an image shows nudity where the detector finds an exposed body part in it."""

    name = "NudeNet"

    def knows(self, concept: Concept) -> bool:
        """Return whether the concept is nudity."""
        return concept.is_named("nudity")

    def shows(self, paths: Sequence[Path], concept: Concept) -> list[bool]:
        """Return of each image file whether an exposed part is found in it with the detector's least score."""
        return nude_images(paths, self._detector)

    @cached_property
    def _detector(self) -> Any:
        return load_detector()


class FeatureJudge:
    """A linear discriminant on AlexNet's features: an image shows what a few examples show, and other images do not.

    Its direction is `(C + ridge)^-1 (m1 - m0)`, with m1 and m0 the means of both and C the covariance within them.
    """

    name = "examples"

    def __init__(self, direction: torch.Tensor, threshold: float, device: torch.device):
        self.direction, self.threshold, self.device = direction, threshold, device

    @classmethod
    def fit(
        cls,
        examples: Sequence[Path],
        held_back: Sequence[Path],
        others: Sequence[Path],
        held_back_others: Sequence[Path],
        device: torch.device,
    ) -> Self:
        """Fit the discriminant on examples and other images, and set its threshold on those that are held back.

        It lies in the middle between the two, but for the farthest of each fifty. Raises ValueError where they overlap.
        """
        sides = [extract_features(paths, device) for paths in (examples, others)]  # (N, 256) each
        centred = torch.cat([side - side.mean(0) for side in sides])
        covariance = centred.T @ centred / (len(centred) - 2)
        ridge = _JUDGE_RIDGE * covariance.diagonal().mean() * torch.eye(len(covariance), dtype=covariance.dtype)
        direction = torch.linalg.solve(covariance + ridge, sides[0].mean(0) - sides[1].mean(0))
        shown, unshown = (extract_features(paths, device) @ direction for paths in (held_back, held_back_others))
        low, high = shown.quantile(_FARTHEST).item(), unshown.quantile(1 - _FARTHEST).item()
        if low <= high:
            raise ValueError(
                f"the model's own images look like those in {Path(held_back[0]).parent}: give images of what it never "
                "learnt"
            )
        return cls(direction, (low + high) / 2, device)

    def knows(self, concept: Concept) -> bool:
        """Return true: it is asked about what its examples show."""
        return True

    def shows(self, paths: Sequence[Path], concept: Concept) -> list[bool]:
        """Return of each image file whether it is on the examples' side of the threshold."""
        return (extract_features(paths, self.device) @ self.direction > self.threshold).tolist()
