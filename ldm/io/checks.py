"""Whether what JSON says is of the kind that it should be. No torch here."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


def check_header(path: Path, metadata: Mapping[str, Any], kinds: Mapping[str, Callable[[Any], bool]]) -> None:
    """Raise ValueError when a value of a file's metadata is not of its kind; one that is not there is none."""
    for name, is_kind in kinds.items():
        if name in metadata and not is_kind(metadata[name]):
            value = str(metadata[name])[:50]
            raise ValueError(f"{path} says '{value}' for {name}, which no such file can: make it again")


def is_text(value: Any) -> bool:
    """Return whether a value of JSON is a text, which no half of a surrogate pair is."""
    return isinstance(value, str) and not re.search("[\ud800-\udfff]", value)


def is_texts(value: Any) -> bool:
    """Return whether a value of JSON is a list of texts."""
    return isinstance(value, list) and all(map(is_text, value))


def is_count(value: Any) -> bool:
    """Return whether a value of JSON is a whole number from 0."""
    return type(value) is int and 0 <= value < 2**63


def is_number(value: Any) -> bool:
    """Return whether a value of JSON is a finite number."""
    return (type(value) is float and math.isfinite(value)) or (type(value) is int and abs(value) < 2**63)


def is_mapping(value: Any) -> bool:
    """Return whether a value of JSON is a mapping."""
    return isinstance(value, dict)


def is_json(content: bytes | str) -> bool:
    """Return whether a text is JSON."""
    try:
        json.loads(content)
    except (ValueError, RecursionError):
        return False
    return True
