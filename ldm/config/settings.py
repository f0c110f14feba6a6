"""What all settings are: fields that carry their help and their limits, checked when they are made."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, fields, replace
from difflib import get_close_matches
from typing import Any, Self


def setting(
    default: Any,
    help_text: str,
    choices: tuple[str, ...] = (),
    minimum: float | None = None,
    above: float | None = None,
    training_only: bool = False,
) -> Any:
    """Declare a field: its default, meaning and possible values, and whether it acts only in training."""
    metadata = {
        "help": help_text,
        "choices": choices,
        "minimum": minimum,
        "above": above,
        "training_only": training_only,
    }
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Settings:
    """What all settings share: their values are checked when they are made."""

    def __post_init__(self) -> None:
        for entry in fields(self):
            limits = {**entry.metadata, "type": str(entry.type)}
            check_value(entry.name, getattr(self, entry.name), limits)

    def with_changes(self, **changes: Any) -> Self:
        """Return a copy with other values. Raises ValueError, with the nearest name, for an unknown setting."""
        known = [entry.name for entry in fields(self)]
        for name in changes:
            if name not in known:
                raise ValueError(f"no setting {name}{did_you_mean(name, known)}: choose from {', '.join(known)}")
        return replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as they are written into metadata."""
        return asdict(self)


_MOST_INT, _MOST_FLOAT, _MOST_SEED = 10**9, 1e30, 2**63 - 1  # what torch's own types hold, with room


def _is_of_type(value: Any, kind: str) -> bool:
    """Return whether a value is of a type of an annotation such as 'int | str | None'; None is of none of them."""
    fits = {
        "bool": isinstance(value, bool),
        "int": isinstance(value, int) and not isinstance(value, bool),
        "float": isinstance(value, int | float) and not isinstance(value, bool),
        "str": isinstance(value, str),
        "tuple[str, ...]": isinstance(value, tuple | list) and all(isinstance(item, str) for item in value),
    }
    names = [name.strip() for name in kind.split("|")]
    return any(fits.get(name, False) for name in names) or not set(names) & set(fits)


def check_value(name: str, value: Any, limits: Any) -> None:
    """Raise ValueError for a value outside the `limits` of a field's metadata and its type, or that is not finite."""
    if value is None and "None" in limits.get("type", "None"):
        return
    choices, minimum, above = (limits.get(key) for key in ("choices", "minimum", "above"))
    if choices and value not in choices:
        raise ValueError(f"`{name}` '{value}' is none of {', '.join(choices)}")
    kind = limits.get("type", "")
    if not _is_of_type(value, kind):
        raise ValueError(f"`{name}` {value!r} is not of the type {kind}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"`{name}` '{value}' is not a finite number")
    most = _MOST_SEED if name == "seed" else _MOST_INT if isinstance(value, int) else _MOST_FLOAT
    if isinstance(value, int | float) and abs(value) > most:
        raise ValueError(f"`{name}` '{value}' is too large: {most:g} is the most")
    if minimum is not None and not isinstance(value, str) and value < minimum:
        raise ValueError(f"`{name}` '{value}' is not a number from {minimum:g}")
    if above is not None and value <= above:
        raise ValueError(f"`{name}` '{value}' is not above {above:g}")


def did_you_mean(name: str, known: list[str]) -> str:
    """Return ', did you mean X?' for the nearest of the `known` names; empty when none is near."""
    nearest = get_close_matches(name, known, n=1)
    return f", did you mean {nearest[0]}?" if nearest else ""
