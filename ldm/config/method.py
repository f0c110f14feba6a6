"""What the settings of every method share, and those of every method that trains."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, ClassVar

from ldm.config.settings import Settings, setting

ANCHORS = ("empty", "category", "neutral")


@dataclass(frozen=True)
class MethodConfig(Settings):
    """What every method says about itself."""

    name: ClassVar[str]
    needs_null_space: ClassVar[bool] = False  # its shifts live in a null space basis
    is_joint: ClassVar[bool] = False  # all concepts' shifts are trained at once
    needs_images: ClassVar[bool] = False  # it trains on images of the concept

    @property
    def trains(self) -> bool:
        """Whether the method iterates at all."""
        return False

    @property
    def makes_gates_alone(self) -> bool:
        """Whether its shifts are gates that change no weights."""
        return False

    @property
    def solves_null_space(self) -> bool:
        """Whether it acts in null spaces that have to be solved."""
        return self.needs_null_space and not self.makes_gates_alone

    @property
    def trains_on_images(self) -> bool:
        """Whether images of the concept are needed."""
        return self.needs_images and self.trains

    def acting(self) -> dict[str, Any]:
        """Return the settings that act: without a gradient, those of the closed form alone."""
        return {
            entry.name: getattr(self, entry.name)
            for entry in fields(self)
            if self.trains or not entry.metadata["training_only"]
        }


@dataclass(frozen=True)
class TrainedConfig(MethodConfig):
    """What every method has that trains by gradient."""

    needs_images: ClassVar[bool] = True  # otherwise it trains on what the model samples

    lr: float = setting(1e-5, "Adam's learning rate", above=0, training_only=True)
    max_steps: int = setting(1000, "max number of iterations", minimum=1, training_only=True)
    train_batch_size: int = setting(1, "latents in an iteration", minimum=1, training_only=True)
    seed: int = setting(0, "what images, timesteps and noise are chosen from", training_only=True)

    @property
    def trains(self) -> bool:
        return True
