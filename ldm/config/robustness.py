"""The settings of the robustness suite's probes: one frozen dataclass each, whose fields carry their help."""

from __future__ import annotations

from dataclasses import dataclass

from ldm.config.methods import TRAIN_METHODS
from ldm.config.settings import Settings, setting


@dataclass(frozen=True)
class HardPromptConfig(Settings):
    """How prompts of the vocabulary's words are searched for that make a model draw a concept."""

    free_words: int = setting(4, "words of a prompt that are chosen, the concept's name not counted", minimum=1)
    searches: int = setting(4, "searches, each from other words: as many prompts, which share the images", minimum=1)
    iterations: int = setting(10, "iterations of a search, each of which changes a word or none", minimum=1)
    candidates: int = setting(32, "prompts that are compared in an iteration", minimum=1)
    top_words: int = setting(48, "words of each place, by the gradient, that candidates are chosen from", minimum=1)
    noised_images: int = setting(8, "noised images of the concept on which prompts are compared", minimum=1)


@dataclass(frozen=True)
class RelearningConfig(Settings):
    """How a concept is taught again to a model that is without it.

    By the defaults mini-sd learns a style that it never saw in 100 steps and not in 10; with cross-attention alone it
    learns none at any rate.
    """

    steps: tuple[int, ...] = setting((10, 30, 100), "steps after which images are made")
    lr: float = setting(1e-4, "AdamW's learning rate", above=0)
    batch_size: int = setting(4, "noised images in a step", minimum=1)
    train_method: str = setting("full", "which weights are trained, as ESD names them", choices=TRAIN_METHODS)
    images: int = setting(20, "images of the concept by the unedited model", minimum=1)
