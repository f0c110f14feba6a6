"""What a shift's file is called inside, what its header says, and how large its numbers may be."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ldm.io.checks import is_count, is_mapping, is_number, is_text, is_texts

SHIFT_FILE_TYPE = "weight shift"
LARGEST = 1e30  # that a shift may add to a weight: float32 holds a little more
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
    **dict.fromkeys(("captions", "protected", "aliases"), is_texts),
    **dict.fromkeys(("concept_index", "iterations", "rank"), is_count),
    **dict.fromkeys(("scale", "rank_rtol", "target_change", "max_leakage_protected"), is_number),
    **dict.fromkeys(("config", "gate", "effects", "streams"), is_mapping),
}


def check_size(path: Path, largest: float) -> None:
    """Raise ValueError when a shift adds more to a weight than can be read back."""
    if not largest <= LARGEST:
        raise ValueError(f"{path} is not written: it would add {largest:.0e} to a weight: lower `lr` or `basis_scale`")
