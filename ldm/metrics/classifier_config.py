"""How a classifier is trained. No torch here, so that a command line can show these settings at once."""

from __future__ import annotations

from dataclasses import dataclass

from ldm.config.settings import Settings, setting


@dataclass(frozen=True)
class ClassifierConfig(Settings):
    """How `ldm.metrics.classifier_training.train_classifier` trains."""

    image_size: int = setting(64, "pixels on a side of what the classifier sees", minimum=1)
    train_batch_size: int = setting(64, "images in an iteration", minimum=1)
    epochs: int = setting(3, "passes over the images", minimum=1)
    max_lr: float = setting(0.05, "peak of the cyclic learning rate")
    seed: int = setting(0, "of the initial weights, the order of the images and their augmentations")
