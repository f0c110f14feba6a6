"""A shift that was made on one text encoder, for a model that has this encoder among others, or for another purpose.

A file is bound to its text encoder, by digest, and to what it changes of it: streams, the tokens' embeddings and maybe
the pooled one, and which hidden states the former are. A model may have that encoder under another name, beside others,
or take less of it. Then the gate reads it there, and the maps act on what the model takes.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F

from ldm.diffusion.family import AFTER_NORM, LAST, STATES_KEY
from ldm.diffusion.text_layers import POOLED, TOKENS
from ldm.diffusion.text_model import TextModel
from ldm.erasure.gated_edit import GatedEdit
from ldm.erasure.shift import EmbeddingShift, WeightShift

_OF_THE_WHOLE = ("encoders", "unchanged", STATES_KEY)  # what metadata say of all text encoders together


def needs_fitting(model: TextModel, shift: WeightShift) -> bool:
    """Return whether a model has a text encoder that a shift was made on, and takes other things of it."""
    if shift.parts or _made_on(shift) == model.text_digest:
        return bool(shift.parts) or not _is_for(model, shift)
    return any(_made_on(part) in _digests(model) for part in (shift, *_by_encoder(shift)))


def _made_on(shift: WeightShift) -> str | None:
    return shift.metadata.get("text_digest")


def _digests(model: TextModel) -> set[str]:
    return {model.text_digest, *model.encoder_digests.values()}


def _is_for(model: TextModel, shift: WeightShift) -> bool:
    """Return whether a part was made on just what a model takes of all its text encoders."""
    return _made_on(shift) == model.text_digest and _streams(shift) == model.widths and _kind(shift) == model.kind


def _kind(shift: WeightShift) -> str:
    return shift.metadata.get(STATES_KEY, LAST)


def fitted_to(model: TextModel, shift: WeightShift) -> tuple[WeightShift, list[str]]:
    """Return a shift as it acts on a model for which it `needs_fitting`, and the places that it leaves unchanged.

    Of several parts it is one that was made on all that the model takes, or else those together that were made on its
    text encoders: of two that change the same place the first. Raises ValueError where no part changes anything that
    the model takes.
    """
    whole = [shift, *shift.parts]
    for part in whole:
        if _is_for(model, part):
            return _alone(part), []
    fitting = [part for each in whole for part in (each, *_by_encoder(each)) if _made_on(part) in _digests(model)]
    if not fitting:
        return _alone(shift), []  # which is refused by its digest
    fitted, by_weights = _fitted(model, fitting[0])
    for part in fitting[1:]:
        more, places = _fitted(model, part)
        if not (places | _mapped(more)) & (by_weights | _mapped(fitted)):
            fitted, by_weights = _joined(fitted, more), by_weights | places
    if fitted.gated is not None and not fitted.gated.gates:  # whose maps nothing would let act
        fitted.gated = None
    changed = by_weights | _mapped(fitted)
    if not changed:
        kind = _kind(fitting[0])
        if kind == model.kind or any(_kind(part) == model.kind for part in fitting):
            raise ValueError(
                f"{shift.path} has no gate, and in {model.name} other text encoders give to the columns that it "
                f"changes: make it on {model.name} itself, or with a gate"
            )
        raise ValueError(
            f"{shift.path} changes the {kind} of its text encoder, and {model.name} takes other states of it: make it "
            f"on {model.name} itself"
        )
    left = [place for place in _all_places(model) if not {place, place.partition(".")[0]} & changed]
    if left:
        fitted.metadata["unchanged"] = left
    return fitted, left


def _by_encoder(shift: WeightShift) -> Iterator[WeightShift]:
    """Return what a shift that was made on several text encoders does to what each of them gives.

    That are its maps, its gate where it has one, and a change of the weights where no other gives to the same stream.
    """
    said: Mapping[str, Any] = shift.metadata.get("encoders", {})
    digests = {name: own["text_digest"] for name, own in said.items()}
    whole = _columns(_streams(shift)) if said else {}
    if any(stream not in whole for own in said.values() for stream in own["streams"]):
        raise ValueError(f"{shift.path} says other streams of its text encoders than it has: make it again")
    for digest in dict.fromkeys(digests.values()):
        names = [name for name in said if digests[name] == digest]
        givers = {stream: [n for n in said if stream in said[n]["streams"]] for stream in (TOKENS, POOLED)}
        streams: dict[str, int] = {}
        for stream in (TOKENS, POOLED):
            widths = [said[name]["streams"][stream] for name in names if stream in said[name]["streams"]]
            streams |= {stream: widths[0]} if widths else {}
        sole = [stream for stream in streams if len({digests[name] for name in givers[stream]}) == 1]
        part = _alone(shift)
        part.metadata = {name: value for name, value in shift.metadata.items() if name not in _OF_THE_WHOLE}
        kinds = [said[name][STATES_KEY] for name in names if STATES_KEY in said[name]]
        part.metadata |= {"text_digest": digest, "streams": streams} | ({STATES_KEY: kinds[0]} if kinds else {})
        if isinstance(part, EmbeddingShift) and part.rank:
            after = _columns(streams)
            _move(part, [(whole[stream], after[stream]) for stream in sole], sum(streams.values()))
        edit = shift.gated
        part.gated = None
        if edit is not None:
            own = {name: gate for name, gate in edit.gates.items() if name in names}
            places = {
                stream: [stream] if stream in sole else [f"{stream}.{name}" for name in names] for stream in streams
            }
            maps = {stream: edit.maps[place] for stream in streams for place in places[stream] if place in edit.maps}
            if maps:
                layers = {name: edit.layers[name] for name in own}
                part.gated = replace(edit, gates=own, layers=layers, maps=maps)
        yield part


def _alone(part: WeightShift) -> WeightShift:
    alone = copy(part)
    alone.parts = []
    return alone


def _joined(one: WeightShift, other: WeightShift) -> WeightShift:
    """Return two fitted parts as one shift, which change other places of the same model."""
    joined = copy(one)
    if isinstance(joined, EmbeddingShift) and isinstance(other, EmbeddingShift):
        joined.outputs = torch.cat([joined.outputs, other.outputs], dim=1)
        joined.directions = torch.cat([joined.directions, other.directions])
    if one.gated is not None and other.gated is not None:
        own, more = one.gated, other.gated
        joined.gated = replace(
            own, gates={**more.gates, **own.gates}, layers={**more.layers, **own.layers}, maps={**more.maps, **own.maps}
        )
    else:
        joined.gated = one.gated or other.gated
    return joined


def _mapped(shift: WeightShift) -> set[str]:
    """Return the places for which a shift has maps."""
    return set(shift.gated.maps) if shift.gated is not None else set()


def _fitted(model: TextModel, shift: WeightShift) -> tuple[WeightShift, set[str]]:
    """Return a part as it acts on a model, and the places that its change of the weights changes."""
    places, name = _places(model, shift)
    fitted = _alone(shift)
    kept = {name: value for name, value in shift.metadata.items() if name not in ("unchanged", "encoders")}
    fitted.metadata = {**kept, STATES_KEY: model.kind, **model.encoded_as}
    if shift.gated is not None:
        fitted.gated = _gated(shift.gated, places, name)
    by_weights: set[str] = set()
    if isinstance(fitted, EmbeddingShift):
        is_after_norm = _parts(_kind(shift))[1] == _parts(model.kind)[1]  # as weights act behind it, and maps before
        by_weights = _fit_factors(model, fitted, _streams(shift), places if is_after_norm else {})
    return fitted, by_weights


def _parts(kind: str) -> tuple[str, str]:
    """Return which hidden states a kind names, and the digest of the norm behind them; empty for none."""
    states, _, norm = kind.partition(AFTER_NORM)
    return states, norm


def _streams(shift: WeightShift) -> dict[str, int]:
    """Return how wide each stream is that a shift was made on; a file of one stream, or an older one, does not say.

    Raises ValueError for widths that are not those of the shift.
    """
    width = len(shift.outputs) if isinstance(shift, EmbeddingShift) else 0
    if shift.gated is not None and TOKENS in shift.gated.maps and not shift.rank:
        width = len(shift.gated.maps[TOKENS].outputs)
    said = shift.metadata.get("streams") or {TOKENS: width}
    found = {stream: int(said[stream]) for stream in (TOKENS, POOLED) if stream in said}  # in the order of columns
    if shift.rank and isinstance(shift, EmbeddingShift) and sum(found.values()) != len(shift.outputs):
        raise ValueError(f"{shift.path} says other widths of its streams than it has: make it again")
    return found


def _places(model: TextModel, shift: WeightShift) -> tuple[dict[str, str], str]:
    """Return the model's places by the streams of a shift, and what the model calls its text encoder."""
    digest, kind = shift.metadata["text_digest"], _parts(_kind(shift))[0]
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
    moves: list[tuple[slice, slice]] = []
    changed: set[str] = set()
    for stream, columns in _columns(streams).items():
        place = places.get(stream)
        if shift.rank and place is not None and model.owns_columns(place):
            moves.append((columns, model.places[place][1]))
            changed.add(place)
    _move(shift, moves, model.context_dim)
    return changed


def _move(shift: EmbeddingShift, moves: Sequence[tuple[slice, slice]], width: int) -> None:
    """Let a shift act on rows of another `width`: what it does to some columns, on others there."""
    outputs = [shift.outputs.new_zeros(width, 0)]
    directions = [outputs[0].T]
    for own, other in moves:
        if own.stop - own.start != other.stop - other.start:
            raise ValueError(f"{shift.path} says other widths of its streams than it has: make it again")
        found, around = shift.directions[:, own], (other.start, width - other.stop)
        acting = found.any(dim=1)
        directions.append(F.pad(found[acting], around))
        outputs.append(F.pad(shift.outputs[own][:, acting], (0, 0, *around)))
    shift.outputs, shift.directions = torch.cat(outputs, dim=1), torch.cat(directions)
    shift.is_whole = False


def _columns(streams: Mapping[str, int]) -> dict[str, slice]:
    """Return the columns of rows that are each stream's."""
    ends = itertools.accumulate(streams.values())
    return {name: slice(end - width, end) for (name, width), end in zip(streams.items(), ends, strict=True)}


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
    if len(edit.gates) > 1:
        return None
    gates = dict(zip([name], edit.gates.values(), strict=False))
    return replace(edit, gates=gates, layers=dict(zip([name], edit.layers.values(), strict=False)), maps=maps)
