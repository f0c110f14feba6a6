"""A pipeline of diffusers that a user holds, as the closed form reads a model."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

import torch

from ldm.diffusion.batches import States
from ldm.diffusion.family import Family, unwrapped
from ldm.diffusion.model import DiffusionModel
from ldm.diffusion.pipeline_encoder import NEGATIVES, PipelineEncoder


@dataclass
class PipelineModel(DiffusionModel):
    """The text encoders and the text layers of a pipeline. They are the pipeline's own, and stay where and as they are.

    Prompts are embedded by the pipeline's own `encode_prompt`, so that whatever moves its parts between devices goes on
    doing so. Nothing else that a `DiffusionModel` does is meant to be used.
    """

    @classmethod
    def of(cls, pipe: Any) -> Self:
        """Return the model that a pipeline is. Raises ValueError as `PipelineEncoder.of` does."""
        name = type(pipe).__name__
        return cls(name, name, pipe, pipe.device)

    def __post_init__(self) -> None:
        self._encoder = PipelineEncoder.of(self.pipeline)
        self.denoiser: Any = unwrapped(getattr(self.pipeline, self.adapter.denoiser))
        self._text_encoders: dict[str, Any] = self._encoder.text_encoders
        self._tokenizers: list[Any] = self._encoder.tokenizers
        self._checked_prompts: set[str] = set()

    @property
    def adapter(self) -> Family:
        return self._encoder.adapter

    def _encode(self, prompts: list[str], layers: Mapping[str, Collection[int]]) -> tuple[torch.Tensor, States]:
        return self._encoder.encode_with_states(prompts, layers)

    def encode_uncond(self) -> torch.Tensor:
        return replace(self._encoder, side=NEGATIVES).encode_with_states([""], {})[0]

    def notify_of_cuts(self, prompts: Iterable[str], is_brief: bool = False) -> None:
        """Say nothing: the prompts are templates, whose names are looked for in what the model reads."""
