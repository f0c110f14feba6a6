"""Gated edits: what erases concepts in the prompts that say them, and leaves every other prompt as it is."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import torch

from ldm.erasure.embedding_map import EmbeddingMap, join_maps
from ldm.erasure.gate import Gate, byte_scales, join_gates
from ldm.io.checks import is_mapping, is_number

LAST_STATE = -1  # the state that is what the denoiser is given, as in `ldm.diffusion.text_states`

States = Mapping[tuple[str, int], torch.Tensor]  # by text encoder and layer: (N, T, width of that encoder)

# Of three styles said together 1 of 96 images was left at 1.3, and none at 1.4 and 1.5 (mini-sd-minilm). Where two
# maps were fitted on the same rows, as of two names that say each other, it goes four tenths too far.
JOINED_SCALE = 1.4
_MAP_PARTS = ("outputs", "directions", "gram")
# Where a map acts: on a stream, or on what one of several text encoders gives to it.
_PLACE = re.compile(r"(tokens|pooled)(\.text_encoder(_[23])?)?")
Places = Mapping[str, tuple[slice, slice]]  # rows and columns of prompts' rows (T + 1, d + p), by the place's name
_WHOLE: Places = {"tokens": (slice(None), slice(None))}
_ROUNDING = 1e-6  # of moments in a file, relative to the largest
_LARGEST = 1e15  # of a number in a file, so that products of a few stay finite


def is_gated_tensor(name: str) -> bool:
    """Return whether a tensor of a shift's file is a part of its gated edit."""
    return name.startswith(("gate.", "map."))


@dataclass(frozen=True)
class GatedEdit:
    """What erases a concept in the prompts that say it: a gate for each text encoder, and a map for each place.

    `layers` says which hidden state each gate reads. Places are the streams `tokens` and `pooled`, or, as in
    `tokens.text_encoder_3`, what one text encoder gives to a stream that several share. `report` is what was measured
    when it was fitted, as a shift's metadata have it.
    """

    gates: Mapping[str, Gate]
    layers: Mapping[str, int]
    maps: Mapping[str, EmbeddingMap]
    report: Mapping[str, Any] = field(default_factory=dict)

    @property
    def metadata(self) -> dict[str, Any]:
        """Return what a file's header says of the edit beside its tensors."""
        penalties = {stream: found.penalty for stream, found in self.maps.items()}
        return {**self.report, "layers": dict(self.layers), "penalties": penalties}

    def tensors(self, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
        """Return what a file holds of the edit, by name: its maps in `dtype`, but for their moments."""
        tensors = {}
        for name, gate in self.gates.items():
            tensors |= {f"gate.{name}.{part}": tensor for part, tensor in _gate_tensors(gate).items()}
        for stream, found in self.maps.items():
            for part in _MAP_PARTS:
                tensor: torch.Tensor = getattr(found, part)
                is_half = dtype == torch.float16 and part != "gram"
                tensors[f"map.{stream}.{part}"] = tensor.half() if is_half else _as_file_has(tensor)
        return tensors

    def rounded(self) -> GatedEdit:
        """Return the edit with the maps of a file in half precision."""
        return replace(self, maps={stream: found.rounded() for stream, found in self.maps.items()})

    @classmethod
    def read(cls, tensors: Mapping[str, torch.Tensor], metadata: Any) -> Self | None:
        """Return the edit that a file's tensors and metadata are; None when they do not belong together."""
        found = {name: tensors[name] for name in tensors if is_gated_tensor(name)}
        if not is_mapping(metadata) or not all(_is_number_type(found[name], name) for name in found):
            return None
        layers, penalties = metadata.get("layers"), metadata.get("penalties")
        if not is_mapping(layers) or not layers or not _are_places(penalties):
            return None
        num_bytes = sum(tensor.dtype == torch.int8 for tensor in found.values())  # gates that have scales too
        if len(found) != 2 * len(layers) + num_bytes + len(_MAP_PARTS) * len(penalties):
            return None
        try:
            gates = {name: _read_gate(found, name, metadata) for name in layers}
            maps = {stream: _read_map(found, stream, penalty) for stream, penalty in penalties.items()}
        except (KeyError, ValueError):
            return None
        if not all(type(layer) is int and layer >= LAST_STATE for layer in layers.values()):
            return None
        return cls(gates, layers, maps, metadata)

    def check(self, encoders: Mapping[str, Any], places: Places, path: Path | str) -> None:
        """Raise ValueError unless the edit fits these text encoders by name, and prompts' rows with these places."""
        fits = all(name in encoders for name in self.gates) and all(place in places for place in self.maps)
        for name, gate in self.gates.items():
            fits = fits and _fits(gate, self.layers[name], encoders[name].config)
        for place, found in self.maps.items():
            columns = places[place][1] if place in places else slice(0, 0)
            width, most = columns.stop - columns.start, len(found.outputs)
            is_padded = place == "pooled" and not found.outputs[width:].any()  # as older versions wrote XL's
            fits = fits and (most == width or (most > width and is_padded))
        if not fits:
            raise ValueError(f"{path}: its gate does not fit the model's text encoder: make it again")

    def margins(self, states: States) -> torch.Tensor:
        """Return how far each prompt is above the threshold of the gate that is nearest to firing, (N,)."""
        found = [gate.margins(states[name, self.layers[name]]) for name, gate in self.gates.items()]
        return torch.stack(found).amax(0)


class GatedPrompts:
    """The edits of all erased concepts together, as `edits.edit_embeddings` takes them.

    A prompt that trips no gate keeps every bit. Several that fire in one prompt are one map, by `join_maps`, whose
    change is multiplied by `JOINED_SCALE`: fitted on prompts that say one concept each, it goes only a part of the way.
    """

    def __init__(self, edits: Mapping[str, GatedEdit], places: Places | None = None):
        """`places` are where the model has each place of a map; without them all rows are tokens'."""
        self.edits, self.places = edits, places or _WHOLE
        self._stacks = _stack_gates(edits)
        self._joined: dict[tuple[str, ...], dict[str, EmbeddingMap]] = {}

    @property
    def layers(self) -> Mapping[str, Collection[int]]:
        """The hidden states that the gates read, by text encoder."""
        needed: dict[str, set[int]] = {}
        for name, layer in self._stacks:
            needed.setdefault(name, set()).add(layer)
        return needed

    def margins(self, states: States) -> torch.Tensor:
        """Return how far each prompt is above the threshold of each edit's nearest gate, (N, edits), on the CPU."""
        found = torch.full((len(next(iter(states.values()))), len(self.edits)), -torch.inf)
        for key, (gate, owners) in self._stacks.items():
            margins = gate.direction_margins(states[key]).cpu()  # (N, directions of all gates)
            found = found.scatter_reduce(1, torch.tensor(owners).expand_as(margins), margins, "amax")
        return found

    def fired(self, states: States) -> list[tuple[str, ...]]:
        """Return, for each prompt, the labels of the edits whose gates fire."""
        labels, number = list(self.edits), len(next(iter(states.values())))
        fired = torch.zeros(number, len(labels), dtype=torch.bool)
        for key, (gate, owners) in self._stacks.items():
            fires = (gate.direction_margins(states[key]) > 0).cpu()  # (N, directions of all gates)
            for prompt, direction in fires.nonzero().tolist():
                fired[prompt, owners[direction]] = True
        return [tuple(labels[k] for k in row.nonzero().flatten().tolist()) for row in fired]

    def __call__(self, prompt_embeds: torch.Tensor, states: States) -> torch.Tensor:
        """Return prompt embeddings (N, rows, d) with those of prompts that trip a gate mapped to their anchor."""
        edited = prompt_embeds
        for number, labels in enumerate(self.fired(states)):
            if labels:
                edited = edited.clone() if edited is prompt_embeds else edited
                edited[number] = self._map(labels, prompt_embeds[number])
        return edited

    def _map(self, labels: tuple[str, ...], rows: torch.Tensor) -> torch.Tensor:
        """Return what the maps of several edits together make of the rows (T + 1, d + p) of one prompt."""
        if labels not in self._joined:
            places = dict.fromkeys(place for label in labels for place in self.edits[label].maps)
            scale = JOINED_SCALE if len(labels) > 1 else 1.0
            joined: dict[str, EmbeddingMap] = {}
            for place in places:
                maps = [self.edits[label].maps[place] for label in labels if place in self.edits[label].maps]
                found = join_maps([self._fitted(each, place) for each in maps])
                joined[place] = replace(found, outputs=scale * found.outputs)
            self._joined[labels] = joined
        mapped = rows.clone()
        for place, found in self._joined[labels].items():
            own, columns = self.places[place]
            before = rows[own, columns]
            is_row = before.any(dim=-1, keepdim=True)  # a masked token is none, and stays so
            mapped[own, columns] = torch.where(is_row, found(before), before)
        return mapped

    def _fitted(self, found: EmbeddingMap, place: str) -> EmbeddingMap:
        """Return a map in the columns of its place: those of older versions were padded with zeros."""
        columns = self.places[place][1]
        width = (columns.stop or len(found.outputs)) - (columns.start or 0)
        return replace(found, outputs=found.outputs[:width], directions=found.directions[:, :width])


def _stack_gates(edits: Mapping[str, GatedEdit]) -> dict[tuple[str, int], tuple[Gate, list[int]]]:
    """Return, for each hidden state that is read, the gates of all edits that read it as one, and whose each row is.

    One product then decides for all of them. An edit counts by its number.
    """
    found: dict[tuple[str, int], list[tuple[int, Gate]]] = {}
    for number, edit in enumerate(edits.values()):
        for name, gate in edit.gates.items():
            found.setdefault((name, edit.layers[name]), []).append((number, gate))
    stacks: dict[tuple[str, int], tuple[Gate, list[int]]] = {}
    for key, members in found.items():
        owners: list[int] = []
        for number, gate in members:
            owners += [number] * len(gate.weights)
        stacks[key] = join_gates([gate for _, gate in members]), owners
    return stacks


def _are_places(penalties: Any) -> bool:
    """Return whether a header's penalties are those of maps of places."""
    return is_mapping(penalties) and bool(penalties) and all(_PLACE.fullmatch(str(place)) for place in penalties)


def _as_file_has(tensor: torch.Tensor) -> torch.Tensor:
    """Return a part of a map in half precision where that rounds nothing, as of maps fitted so, else in float32."""
    half = tensor.half()
    return half if torch.equal(half.double(), tensor) else tensor.float()


def _gate_tensors(gate: Gate) -> dict[str, torch.Tensor]:
    """Return the parts of a gate that a file has: weights in bytes and thresholds, both divided by the scales.

    Which prompts trip the gate follows without the scales. One of an older file has none, and weights in float16.
    """
    scales = byte_scales(gate.weights)
    numbers = (gate.weights / scales).to(torch.int8)
    if not torch.equal(numbers * scales, gate.weights):
        return {"weights": gate.weights.half(), "thresholds": gate.thresholds}
    return {"weights": numbers, "thresholds": gate.thresholds / scales[:, 0], "scales": scales[:, 0].clone()}


def _is_number_type(tensor: torch.Tensor, name: str) -> bool:
    """Return whether a part of an edit has numbers as a file may have them."""
    is_bytes = tensor.dtype == torch.int8 and name.startswith("gate.") and name.endswith(".weights")
    return tensor.is_floating_point() or is_bytes


def _fits(gate: Gate, layer: int, config: Any) -> bool:
    """Return whether a text encoder with this config has the hidden state that a gate reads."""
    return layer < config.num_hidden_layers and gate.weights.shape[1] == config.hidden_size


def _read_gate(tensors: Mapping[str, torch.Tensor], name: str, metadata: Mapping[str, Any]) -> Gate:
    """Return the gate of a text encoder. Raises ValueError for tensors of wrong shapes or sizes."""
    stored, thresholds = (tensors[f"gate.{name}.{part}"] for part in ("weights", "thresholds"))
    weights, scales = stored.float(), torch.ones(thresholds.shape)  # of older files
    if stored.dtype == torch.int8:
        scales = tensors[f"gate.{name}.scales"].float()
    if scales.shape != thresholds.shape or not (scales > 0).all() or not (torch.frexp(scales).mantissa == 0.5).all():
        raise ValueError("wrong scales")
    if weights.dim() != 2 or not len(weights) or thresholds.shape != weights.shape[:1]:
        raise ValueError("wrong shapes")
    weights, thresholds = weights * scales[:, None], thresholds.float() * scales
    _check_sizes(weights, thresholds)
    gap = metadata.get("gap")
    return Gate(weights, thresholds, float(gap) if gap is not None and is_number(gap) else 0.0)


def _read_map(tensors: Mapping[str, torch.Tensor], stream: str, penalty: Any) -> EmbeddingMap:
    """Return the map of a stream. Raises ValueError for tensors of wrong shapes or sizes, and for no penalty."""
    outputs, directions, gram = (tensors[f"map.{stream}.{part}"].double() for part in _MAP_PARTS)
    if directions.dim() != 2 or not len(directions) or outputs.shape != directions.T.shape:
        raise ValueError("wrong shapes")
    if gram.shape != (len(directions), len(directions)):
        raise ValueError("wrong shapes")
    if not is_number(penalty) or not 0 < penalty < _LARGEST:
        raise ValueError("wrong penalty")
    _check_sizes(outputs, directions, gram)
    values = torch.linalg.eigvalsh(gram)  # the largest last
    if not torch.allclose(gram, gram.T) or values[0] < penalty - _ROUNDING * values[-1]:
        raise ValueError("no moments of rows")  # from which maps could not be joined
    return EmbeddingMap(outputs, directions, gram, float(penalty))


def _check_sizes(*tensors: torch.Tensor) -> None:
    if any(tensor.numel() == 0 or tensor.abs().max() > _LARGEST for tensor in tensors):
        raise ValueError("empty or too large")
