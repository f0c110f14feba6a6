"""SRS-ME: make a text-to-image diffusion model forget concepts, one by one, and restore them.

The Python API, imported when it is used: `load_model`, `erase`, `applied`, `export`, `ConceptEraser` and `Ledger`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ldm.diffusion.load import load_model
    from ldm.erasure.erase import erase
    from ldm.erasure.eraser import ConceptEraser
    from ldm.erasure.export import export
    from ldm.erasure.merge import applied
    from ldm.ledger.ledger import Ledger

__all__ = ["ConceptEraser", "Ledger", "applied", "erase", "export", "load_model"]

_HOMES = {
    "load_model": "ldm.diffusion.load",
    "erase": "ldm.erasure.erase",
    "applied": "ldm.erasure.merge",
    "export": "ldm.erasure.export",
    "ConceptEraser": "ldm.erasure.eraser",
    "Ledger": "ldm.ledger.ledger",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'ldm' has no attribute '{name}': choose from {', '.join(__all__)}")
    return getattr(import_module(_HOMES[name]), name)
