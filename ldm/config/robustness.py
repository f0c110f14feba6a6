"""The settings of attacks by which the robustness suite tells what is gone from what is only hidden."""

from __future__ import annotations

from dataclasses import dataclass

from ldm.config.methods import TRAIN_METHODS
from ldm.config.settings import Settings, setting


@dataclass(frozen=True)
class SoftPromptConfig(Settings):
    """How soft prompts are learnt: vectors in place of words, on images of the concept by the unedited model."""

    soft_lr: float = setting(
        0.15, "Adam's learning rate, in units of the standard deviation of the vocabulary's embeddings", above=0
    )
    soft_steps: int = setting(300, "iterations of a soft prompt", minimum=1)
    soft_batch_size: int = setting(8, "latents in an iteration of a soft prompt", minimum=1)
    soft_first_timestep: float = setting(
        0.3, "the least noisy timestep of a soft prompt, as a fraction of all: those below it decide details", minimum=0
    )
    soft_examples: int = setting(20, "images of the concept that a soft prompt is learnt from", minimum=1)
    soft_clearance: float = setting(
        0.1, "how far below the thresholds of gates a soft prompt stays that is learnt against them", minimum=0
    )
    soft_gate_weight: float = setting(1.0, "weight of what lacks to that, beside the denoising loss", above=0)
    soft_restarts: int = setting(
        2,
        "soft prompts that are learnt, from other seeds; that one attacks whose images are most like the examples",
        minimum=1,
    )
    soft_seed: int = setting(0, "what first vectors, images, timesteps and noise are chosen from")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.soft_first_timestep < 1:
            raise ValueError(
                f"`soft_first_timestep` {self.soft_first_timestep:g} is not below 1: give a fraction, such as 0.3"
            )


@dataclass(frozen=True)
class HardPromptConfig(Settings):
    """How prompts of the vocabulary's words are searched for that make a model draw a concept."""

    hard_words: int = setting(4, "words of a prompt that are chosen, the concept's name not counted", minimum=1)
    hard_searches: int = setting(
        4, "searches, each from other words: as many prompts, which share the images", minimum=1
    )
    hard_iterations: int = setting(10, "iterations of a search, each of which changes a word or none", minimum=1)
    hard_candidates: int = setting(32, "prompts that are compared in an iteration", minimum=1)
    hard_top_words: int = setting(
        48, "words of each place, by the gradient, that candidates are chosen from", minimum=1
    )
    hard_noised_images: int = setting(8, "noised images of the concept on which prompts are compared", minimum=1)


@dataclass(frozen=True)
class RelearningConfig(Settings):
    """How a concept is taught again to a model that is without it.

    By the defaults mini-sd learns a style that it never saw in 100 steps and not in 10; with cross-attention alone it
    learns none at any rate.
    """

    relearning_steps: int = setting(100, "steps; images are made after a tenth and three tenths of them too", minimum=1)
    relearning_lr: float = setting(1e-4, "AdamW's learning rate", above=0)
    relearning_batch_size: int = setting(4, "noised images in a step", minimum=1)
    relearning_train_method: str = setting(
        "full", "which weights are trained, as ESD names them", choices=TRAIN_METHODS
    )
    relearning_images: int = setting(20, "images of the concept by the unedited model", minimum=1)

    @property
    def numbers(self) -> list[int]:
        """Return after how many steps images are made."""
        return sorted({max(1, self.relearning_steps * part // 10) for part in (1, 3, 10)})
