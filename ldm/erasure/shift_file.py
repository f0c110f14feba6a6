"""What a shift's file is called inside, what its header says, and how large its numbers may be."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from ldm.io.checks import check_header, is_count, is_mapping, is_number, is_text, is_texts
from ldm.io.tensors import LazyTensors

SHIFT_FILE_TYPE = "weight shift"
_STREAMS = ("tokens", "pooled")
LARGEST = 1e30  # that a shift may add to a weight: float32 holds a little more


def _are_widths(value: Any) -> bool:
    fits = is_mapping(value) and set(value) <= set(_STREAMS) and all(map(is_count, value.values()))
    return fits and all(0 < width <= _WIDEST for width in value.values())


def _is_encoder(value: Any) -> bool:
    fits = is_mapping(value) and is_text(value.get("text_digest")) and is_text(value.get("hidden_states", ""))
    return fits and _are_widths(value.get("streams"))


HEADER: dict[str, Callable[[Any], bool]] = {  # what a shift's metadata says, where it says it
    **dict.fromkeys(
        (
            "concept",
            "category",
            "method",
            "prompt",
            "anchor",
            "base_model",
            "base_digest",
            "text_digest",
            "concept_kind",
            "hidden_states",
        ),
        is_text,
    ),
    **dict.fromkeys(("captions", "protected", "preserved", "aliases", "unchanged"), is_texts),
    **dict.fromkeys(("concept_index", "iterations", "rank"), is_count),
    **dict.fromkeys(("scale", "rank_rtol", "target_change", "max_leakage_protected"), is_number),
    **dict.fromkeys(("config", "gate", "effects"), is_mapping),
    "streams": _are_widths,
    "encoders": lambda value: is_mapping(value) and all(map(_is_encoder, value.values())),
    "parts": lambda value: isinstance(value, list) and all(map(is_mapping, value)),
}


# What a header says of the model, and of the text encoders, that a shift was made on.
OF_ENCODERS = (
    *("base_model", "base_digest", "text_digest"),
    *("streams", "hidden_states", "encoders", "unchanged"),
)
# What a header says of each text encoder that a file has a part for, beside what it says of all of it.
OF_A_PART = (
    *OF_ENCODERS,
    *("gate", "effects", "protected", "target_change", "max_leakage_protected", "rank", "rank_rtol", "scale"),
)
_WIDEST = 2**16  # of a stream, so that the zeros around others' factors stay few
_PART = re.compile(r"part(\d+)\.")  # before the names of a part's tensors, from the second one on


def part_prefix(number: int) -> str:
    """Return what stands before the names of a part's tensors: nothing for the first, 1."""
    return f"part{number}." if number > 1 else ""


def changed_from(first: Mapping[str, Any], metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a header says of a further part: what is its own, and what differs from the `first`."""
    return {name: value for name, value in metadata.items() if name in OF_A_PART or first.get(name) != value}


def split_parts(path: Path, tensors: LazyTensors, metadata: dict[str, Any]) -> list[tuple[LazyTensors, dict[str, Any]]]:
    """Return the tensors and the metadata of each part of a file, which has one for each text encoder.

    Raises ValueError where the parts are not those that its header names.
    """
    further = metadata.get("parts", [])
    shared = {name: value for name, value in metadata.items() if name not in (*OF_A_PART, "parts")}
    first = {name: value for name, value in metadata.items() if name != "parts"}
    found = [(tensors.where(lambda name: _PART.match(name) is None), first)]
    for number, own in enumerate(further, start=2):
        check_header(path, own, HEADER)
        found.append((tensors.with_prefix(part_prefix(number)), shared | own))
    if sum(len(part) for part, _ in found) != len(tensors) or not all(len(part) for part, _ in found):
        raise ValueError(f"{path} has other parts than its header names: make it again")
    return found


def _in_order(streams: Mapping[str, int]) -> list[tuple[str, int]]:
    """Return the widths of streams in the order of the columns of rows, in which JSON does not keep them."""
    return [(stream, streams[stream]) for stream in _STREAMS if stream in streams]


def factor_tensors(
    outputs: torch.Tensor, directions: torch.Tensor, streams: Mapping[str, int]
) -> dict[str, torch.Tensor]:
    """Return what a file holds of A (d, k) and S (k, d), by name: of several streams each one's own, without zeros.

    Where a direction lies in more than one stream, or there is one stream, it holds both whole.
    """
    found: dict[str, torch.Tensor] = {}
    number = end = 0
    for stream, width in _in_order(streams):
        own, end = slice(end, end + width), end + width
        acting = directions[:, own].any(dim=1)
        if acting.any():
            found |= {f"outputs.{stream}": outputs[own][:, acting], f"directions.{stream}": directions[acting][:, own]}
        number += int(acting.sum())
    if len(streams) < 2 or number != len(directions) or end != directions.shape[1]:
        return {"outputs": outputs, "directions": directions}
    return found


def read_factors(
    tensors: Mapping[str, torch.Tensor], streams: Mapping[str, int]
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Return A (d, k) and S (k, d) of a file's tensors; None when they do not belong together."""
    if set(tensors) == {"outputs", "directions"}:
        outputs, directions = tensors["outputs"], tensors["directions"]
        fits = directions.dim() == 2 and directions.numel() and outputs.shape == directions.T.shape
        return (outputs, directions) if fits else None
    found: list[tuple[torch.Tensor, torch.Tensor]] = []
    end, whole = 0, sum(streams.values())
    for stream, width in _in_order(streams):
        end += width
        if f"outputs.{stream}" not in tensors or f"directions.{stream}" not in tensors:
            continue
        outputs, directions = tensors[f"outputs.{stream}"], tensors[f"directions.{stream}"]
        fits = directions.dim() == 2 and len(directions) > 0 and directions.shape[1] == width
        if not fits or outputs.shape != directions.T.shape:
            return None
        around = end - width, whole - end
        found.append((F.pad(outputs, (0, 0, *around)), F.pad(directions, around)))
    if not found or len(tensors) != 2 * len(found):
        return None
    return torch.cat([outputs for outputs, _ in found], dim=1), torch.cat([directions for _, directions in found])


def check_size(path: Path, largest: float) -> None:
    """Raise ValueError when a shift adds more to a weight than can be read back."""
    if not largest <= LARGEST:
        raise ValueError(f"{path} is not written: it would add {largest:.0e} to a weight: lower `lr` or `basis_scale`")
