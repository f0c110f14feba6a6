"""The one reader of YAML files: it takes what is written and nothing from elsewhere. No torch here."""

from __future__ import annotations

from collections.abc import Sequence
from io import StringIO
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

_MAX_NODES = 100_000  # of a document with its aliases written out


def read_mapping(path: Path, advice: str = "see configs/ of the repository for what belongs there") -> dict[Any, Any]:
    """Return the mapping in a YAML file, as it is written; `advice` is for who gives another.

    Raises ValueError when it cannot be read or is no mapping, when it would grow without end by its aliases, when a key
    stands twice, and when it asks for a value from elsewhere (`${...}`), such as the environment.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
        fault = _fault(yaml.compose(text, Loader=yaml.SafeLoader))
        if fault:
            raise ValueError(fault)
        content = OmegaConf.to_container(OmegaConf.load(StringIO(text)))
    except RecursionError as error:
        raise ValueError(f"cannot read {path}: it is nested too deep") from error
    except (OSError, OmegaConfBaseException, yaml.YAMLError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"cannot read {path}: {' '.join(str(error).split())[:200]}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is no mapping: {advice}")
    return content


def _fault(root: yaml.Node | None) -> str:
    """Return what is wrong with a YAML document before it is made into values, or nothing."""
    waiting, num_nodes = [root], 0
    while waiting:
        node = waiting.pop()
        num_nodes += 1
        if num_nodes > _MAX_NODES:
            return "its aliases make it too large, or lead back to themselves"
        if isinstance(node, yaml.MappingNode):
            repeated = _repeated_key(node)
            if repeated is not None:
                return f"line {repeated.start_mark.line + 1} has the key {repeated.value} again: remove one"
            for pair in node.value:
                waiting += pair
        elif isinstance(node, yaml.SequenceNode):
            waiting += node.value
        elif node is not None and ("${" in node.value or node.value == "???"):
            return f"{node.value} asks for a value from elsewhere: write the value itself"
    return ""


def _repeated_key(mapping: yaml.MappingNode) -> yaml.Node | None:
    """Return a key that stands twice in a mapping, which OmegaConf refuses for texts alone; None for none."""
    known = set()
    for key, _ in mapping.value:
        name = key.tag, str(key.value)
        if name in known:
            return key
        known.add(name)
    return None


def check_keys(value: Any, known: Sequence[str], place: str) -> dict[str, Any]:
    """Return `value`. Raises ValueError, naming `place`, when it is no mapping or has a key that is not known."""
    if not isinstance(value, dict):
        raise ValueError(f"{place} is {value!r}, not a mapping with the keys {', '.join(known)}")
    for key in value:
        if key not in known:
            raise ValueError(f"{place} has the key {key!r}: the keys are {', '.join(known)}")
    return value
