"""A text encoder of a model as if it were the only one, as gates are fitted on it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Self

import torch

from ldm.diffusion.batches import States
from ldm.diffusion.family import TextSource
from ldm.diffusion.pipeline_encoder import PipelineEncoder
from ldm.diffusion.text_layers import POOLED, TOKENS
from ldm.diffusion.text_model import TextModel, join_streams

EncodingModel = TextModel | PipelineEncoder


class EncoderView:
    """What a text encoder of a model makes of prompts: the rows that it gives to each stream, and its hidden states.

    `sources` are several where the model has the very same encoder more than once. Its name is that of the first.
    """

    def __init__(self, model: EncodingModel, sources: Sequence[TextSource]):
        self.model, name = model, sources[0].name
        self.text_encoders: dict[str, Any] = {name: model.text_encoders[name]}
        self.tokenizers: list[Any] = [model.tokenizers[list(model.text_encoders).index(name)]]
        self.place_names: dict[str, str] = {}  # what the model calls each place: the stream, where it gives all of it
        whole = model.places
        for stream in (TOKENS, POOLED):
            owned = (f"{stream}.{source.name}" for source in sources)
            own = next((place for place in owned if place in whole), None)
            if own is not None:
                self.place_names[stream] = stream if whole[own] == whole[stream] else own

    @classmethod
    def of(cls, model: EncodingModel) -> list[Self]:
        """Return a view for each text encoder that a model has, in the order of its sources."""
        groups: dict[str, list[TextSource]] = {}
        for source in model.sources:
            groups.setdefault(model.encoder_digests[source.name], []).append(source)
        return [cls(model, sources) for sources in groups.values()]

    @property
    def places(self) -> dict[str, tuple[slice, slice]]:
        """Return the rows and columns of this encoder's rows that are each stream's."""
        found: dict[str, tuple[slice, slice]] = {}
        row = column = 0
        for stream, name in self.place_names.items():
            rows, columns = self.model.places[name]
            ends = row + rows.stop - rows.start, column + columns.stop - columns.start
            found[stream] = slice(row, ends[0]), slice(column, ends[1])
            row, column = ends
        return found

    def encode_with_states(
        self, prompts: list[str], layers: Mapping[str, Collection[int]]
    ) -> tuple[torch.Tensor, States]:
        """Return the rows of prompts (N, t + 1, d + p) that it gives, and its hidden states after `layers`."""
        rows, states = self.model.encode_with_states(prompts, layers)
        own = {stream: rows[:, *self.model.places[name]] for stream, name in self.place_names.items()}
        if TOKENS not in own:
            return own[POOLED], states
        return join_streams(own[TOKENS], own[POOLED][:, 0] if POOLED in own else None), states
