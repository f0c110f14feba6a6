"""The settings of attacks by which the robustness suite tells what is gone from what is only hidden."""

from __future__ import annotations

from dataclasses import dataclass

from ldm.config.settings import Settings, setting


@dataclass(frozen=True)
class SoftPromptConfig(Settings):
    """How soft prompts are learnt: vectors in place of words, on images of the concept by the unedited model."""

    soft_lr: float = setting(
        0.15, "Adam's learning rate, in units of the standard deviation of the vocabulary's embeddings", above=0
    )
    soft_steps: int = setting(150, "iterations of a soft prompt", minimum=1)
    soft_batch_size: int = setting(8, "latents in an iteration of a soft prompt", minimum=1)
    soft_first_timestep: float = setting(
        0.3, "the least noisy timestep of a soft prompt, as a fraction of all: those below it decide details", minimum=0
    )
    soft_examples: int = setting(20, "images of the concept that a soft prompt is learnt from", minimum=1)
    soft_clearance: float = setting(
        0.1, "how far below the thresholds of gates a soft prompt stays that is learnt against them", minimum=0
    )
    soft_gate_weight: float = setting(1.0, "weight of what lacks to that, beside the denoising loss", above=0)
    soft_seed: int = setting(0, "what first vectors, images, timesteps and noise are chosen from")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.soft_first_timestep < 1:
            raise ValueError(
                f"`soft_first_timestep` {self.soft_first_timestep:g} is not below 1: give a fraction, such as 0.3"
            )
