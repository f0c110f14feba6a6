"""A shift that was made on one text encoder, for a model that has this encoder among others, or for another purpose.

A file is bound to its text encoder, by digest, and to what it changes of it: its last hidden states, say. A model may
have that encoder under another name, beside others. Then the gate reads it there, and the map acts on what it gives.
"""

from __future__ import annotations

from copy import copy
from dataclasses import replace

import torch.nn.functional as F

from ldm.diffusion.family import LAST, POOLED_KIND, TextSource
from ldm.diffusion.text_layers import POOLED, TOKENS
from ldm.diffusion.text_model import TextModel
from ldm.erasure.embedding_map import EmbeddingMap
from ldm.erasure.gated_edit import GatedEdit
from ldm.erasure.shift import EmbeddingShift, WeightShift

_FIRST = "text_encoder"  # as a model with one text encoder calls it


def shares_encoder(model: TextModel, shift: WeightShift) -> bool:
    """Return whether a model has the text encoder that a shift was made on among several."""
    made_on = shift.metadata.get("text_digest")
    return made_on != model.text_digest and made_on in model.encoder_digests.values()


def fitted_to(model: TextModel, shift: WeightShift) -> tuple[WeightShift, list[str]]:
    """Return a shift as it acts on a model that `shares_encoder`, and the model's places that it leaves unchanged.

    Raises ValueError where the shift changes nothing that the model takes of the encoder.
    """
    digest = shift.metadata["text_digest"]
    sources = [source for source in model.sources if model.encoder_digests[source.name] == digest]
    places: dict[str, str] = {}  # by what the file calls it
    kinds = {TOKENS: shift.metadata.get("kind", LAST), POOLED: POOLED_KIND}
    for stream, kind in kinds.items():
        place = next((_place(model, source, stream) for source in sources if _gives(source, stream, kind)), None)
        if place is not None:
            places[stream] = place
    fitted = copy(shift)
    fitted.metadata = {**shift.metadata, "text_digest": model.text_digest, "made_on_encoder": digest}
    changed: set[str] = set()
    if shift.gated is not None:
        fitted.gated = _gated(shift.gated, places, sources[0].name)
        changed |= set(fitted.gated.maps) if fitted.gated else set()
    if isinstance(fitted, EmbeddingShift) and fitted.rank:
        place = places.get(TOKENS)
        if place is not None and model.owns_columns(place):
            columns = model.places[place][1]
            around = columns.start, model.context_dim - columns.stop
            fitted.outputs = F.pad(fitted.outputs, (0, 0, *around))
            fitted.directions = F.pad(fitted.directions, around)
            changed.add(place)
        else:
            width = model.context_dim
            fitted.outputs, fitted.directions = fitted.outputs.new_zeros(width, 0), fitted.outputs.new_zeros(0, width)
    if not changed:
        given = ", ".join(source.name for source in sources)
        raise ValueError(
            f"{shift.path} changes the {kinds[TOKENS]} of its text encoder, and {model.name} takes other states of it "
            f"({given}): make it on {model.name} itself"
        )
    left = [place for place in _all_places(model) if place not in changed]
    if left:
        fitted.metadata["unchanged"] = left
    return fitted, left


def _gives(source: TextSource, stream: str, kind: str) -> bool:
    if stream == TOKENS:
        return source.rows is not None and source.kind == kind
    return source.pooled is not None and kind == POOLED_KIND


def _place(model: TextModel, source: TextSource, stream: str) -> str:
    """Return the place of what a text encoder gives to a stream: the stream itself, where it gives all of it."""
    own = f"{stream}.{source.name}"
    return stream if model.places[own] == model.places[stream] else own


def _all_places(model: TextModel) -> list[str]:
    found: list[str] = []
    for stream in (TOKENS, POOLED):
        given = [source for source in model.sources if f"{stream}.{source.name}" in model.places]
        found += [_place(model, source, stream) for source in given]
    return found


def _gated(edit: GatedEdit, places: dict[str, str], name: str) -> GatedEdit | None:
    """Return an edit of one text encoder with the names that a model has for it and its places; None without any."""
    maps: dict[str, EmbeddingMap] = {places[stream]: found for stream, found in edit.maps.items() if stream in places}
    if not maps or set(edit.gates) != {_FIRST}:
        return None
    gates, layers = {name: edit.gates[_FIRST]}, {name: edit.layers[_FIRST]}
    return replace(edit, gates=gates, layers=layers, maps=maps)
