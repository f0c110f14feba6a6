"""SRS-ME: make a text-to-image diffusion model forget concepts, one by one, and restore them.

The Python API, imported when it is used: `load_model`, `erase`, `applied`, `generate`, `export`,
`ConceptEraser` and `Ledger`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ldm.diffusion.load import load_model
    from ldm.erasure.api import applied, erase, export, generate
    from ldm.erasure.eraser import ConceptEraser
    from ldm.ledger.ledger import Ledger

__all__ = ["ConceptEraser", "Ledger", "applied", "erase", "export", "generate", "load_model"]

_HOMES = {
    "load_model": "ldm.diffusion.load",
    "erase": "ldm.erasure.api",
    "applied": "ldm.erasure.api",
    "generate": "ldm.erasure.api",
    "export": "ldm.erasure.api",
    "ConceptEraser": "ldm.erasure.eraser",
    "Ledger": "ldm.ledger.ledger",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'ldm' has no attribute '{name}': choose from {', '.join(__all__)}")
    return getattr(import_module(_HOMES[name]), name)
