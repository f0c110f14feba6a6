"""A shift that was made on one text encoder, for a model that has this encoder among others, or for another purpose.

A file is bound to its text encoder, by digest, and to what it changes of it: streams, the tokens' embeddings and maybe
the pooled one, and which hidden states the former are. A model may have that encoder under another name, beside others,
or take less of it. Then the gate reads it there, and the maps act on what the model takes.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from dataclasses import replace

import torch
import torch.nn.functional as F

from ldm.diffusion.family import AFTER_NORM, LAST, STATES_KEY
from ldm.diffusion.text_layers import POOLED, TOKENS
from ldm.diffusion.text_model import TextModel
from ldm.erasure.gated_edit import GatedEdit
from ldm.erasure.shift import EmbeddingShift, WeightShift

_FIRST = "text_encoder"  # as a model with one text encoder calls it


def needs_fitting(model: TextModel, shift: WeightShift) -> bool:
    """Return whether a model has the text encoder that a shift was made on, and takes other things of it."""
    made_on = shift.metadata.get("text_digest")
    if made_on == model.text_digest:
        return _streams(shift) != model.widths or shift.metadata.get(STATES_KEY, LAST) != model.kind
    return made_on in model.encoder_digests.values()


def fitted_to(model: TextModel, shift: WeightShift) -> tuple[WeightShift, list[str]]:
    """Return a shift as it acts on a model for which it `needs_fitting`, and the places that it leaves unchanged.

    Raises ValueError where the shift changes nothing that the model takes of the encoder.
    """
    places, name = _places(model, shift)
    fitted, kind = copy(shift), shift.metadata.get(STATES_KEY, LAST)
    fitted.metadata = {**shift.metadata, STATES_KEY: model.kind, **model.encoded_as}
    changed: set[str] = set()
    if shift.gated is not None:
        fitted.gated = _gated(shift.gated, places, name)
        changed |= set(fitted.gated.maps) if fitted.gated is not None else set()
    if isinstance(fitted, EmbeddingShift) and fitted.rank:
        is_after_norm = _parts(kind)[1] == _parts(model.kind)[1]  # as weights act behind it, and maps before
        changed |= _fit_factors(model, fitted, _streams(shift), places if is_after_norm else {})
    if not changed:
        raise ValueError(
            f"{shift.path} changes the {kind} of its text encoder, and {model.name} takes other states of it: make it "
            f"on {model.name} itself"
        )
    left = [place for place in _all_places(model) if place not in changed]
    if left:
        fitted.metadata["unchanged"] = left
    return fitted, left


def _parts(kind: str) -> tuple[str, str]:
    """Return which hidden states a kind names, and the digest of the norm behind them; empty for none."""
    states, _, norm = kind.partition(AFTER_NORM)
    return states, norm


def _streams(shift: WeightShift) -> dict[str, int]:
    """Return how wide each stream is that a shift was made on; a file of one stream, or an older one, does not say."""
    width = len(shift.outputs) if isinstance(shift, EmbeddingShift) else 0
    if shift.gated is not None and TOKENS in shift.gated.maps and not shift.rank:
        width = len(shift.gated.maps[TOKENS].outputs)
    said = shift.metadata.get("streams") or {TOKENS: width}
    return {stream: int(said[stream]) for stream in (TOKENS, POOLED) if stream in said}  # in the order of columns


def _places(model: TextModel, shift: WeightShift) -> tuple[dict[str, str], str]:
    """Return the model's places by the streams of a shift, and what the model calls its text encoder."""
    digest, kind = shift.metadata["text_digest"], _parts(shift.metadata.get(STATES_KEY, LAST))[0]
    is_own = digest == model.text_digest
    sources = [source for source in model.sources if is_own or model.encoder_digests[source.name] == digest]
    if is_own and len(set(model.encoder_digests.values())) > 1:  # an older file, of all encoders together
        return {stream: stream for stream in model.widths}, ""
    places: dict[str, str] = {}
    for source in sources:
        if source.rows is not None and source.kind == kind:
            places.setdefault(TOKENS, _place(model, TOKENS, source.name))
        if source.pooled is not None:
            places.setdefault(POOLED, _place(model, POOLED, source.name))
    return {stream: place for stream, place in places.items() if stream in _streams(shift)}, sources[0].name


def _fit_factors(
    model: TextModel, shift: EmbeddingShift, streams: Mapping[str, int], places: Mapping[str, str]
) -> set[str]:
    """Give a shift the factors by which it acts on a model's rows, and return the places that it changes."""
    outputs: list[torch.Tensor] = []
    directions: list[torch.Tensor] = []
    changed: set[str] = set()
    start = 0
    for stream, width in streams.items():
        own, start = slice(start, start + width), start + width
        place = places.get(stream)
        if place is None or not model.owns_columns(place):
            continue
        columns = model.places[place][1]
        around = columns.start, model.context_dim - columns.stop
        found = shift.directions[:, own]
        acting = found.any(dim=1)
        directions.append(F.pad(found[acting], around))
        outputs.append(F.pad(shift.outputs[own][:, acting], (0, 0, *around)))
        changed.add(place)
    nothing = shift.outputs.new_zeros(model.context_dim, 0)
    shift.outputs = torch.cat([nothing, *outputs], dim=1)
    shift.directions = torch.cat([nothing.T, *directions])
    return changed


def _place(model: TextModel, stream: str, name: str) -> str:
    """Return the place of what a text encoder gives to a stream: the stream itself, where it gives all of it."""
    own = f"{stream}.{name}"
    return stream if model.places[own] == model.places[stream] else own


def _all_places(model: TextModel) -> list[str]:
    found: list[str] = []
    for stream in (TOKENS, POOLED):
        given = [source.name for source in model.sources if f"{stream}.{source.name}" in model.places]
        found += dict.fromkeys(_place(model, stream, name) for name in given)
    return found


def _gated(edit: GatedEdit, places: Mapping[str, str], name: str) -> GatedEdit | None:
    """Return an edit with the names that a model has for its text encoder and places; None where it acts on none."""
    maps = {places[stream]: found for stream, found in edit.maps.items() if stream in places}
    if not maps:
        return None
    if not name:
        return replace(edit, maps=maps)
    if len(edit.gates) != 1:
        return None
    [own] = edit.gates
    return replace(edit, gates={name: edit.gates[own]}, layers={name: edit.layers[own]}, maps=maps)
