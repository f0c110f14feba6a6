"""The safe unpickler: pickles of nothing but numpy arrays, from which no code is run."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy._core import multiarray


class _NumpyOnlyUnpickler(pickle.Unpickler):
    """An unpickler that knows what a numpy array is made of and refuses everything else."""

    _ALLOWED: ClassVar = {("numpy", "ndarray"): np.ndarray, ("numpy", "dtype"): np.dtype}
    _REBUILD: ClassVar = {("numpy.core.multiarray", "_reconstruct"), ("numpy._core.multiarray", "_reconstruct")}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in self._REBUILD:
            return multiarray._reconstruct
        if (module, name) in self._ALLOWED:
            return self._ALLOWED[module, name]
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def load_numpy_pickle(path: Path) -> Any:
    """Return what a pickle of nothing but numpy arrays in plain containers holds.

    Raises ValueError when it holds anything else.
    """
    try:
        with open(path, "rb") as opened:
            return _NumpyOnlyUnpickler(opened).load()
    except (pickle.UnpicklingError, EOFError, AttributeError, IndexError, TypeError) as error:
        raise ValueError(f"{path} is not a pickle of numpy arrays alone and was not loaded: {error}") from error
