"""Pickles, from which no code is run: those of torch, and those of nothing but numpy arrays."""

from __future__ import annotations

import pickle
import struct
import warnings
import zipfile
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy._core import multiarray

_UNREADABLE = (  # what reading a file may raise that is no pickle, or a damaged or hostile one
    pickle.UnpicklingError,
    zipfile.BadZipFile,
    struct.error,
    OSError,
    EOFError,
    ValueError,
    LookupError,
    AttributeError,
    TypeError,
    AssertionError,
    OverflowError,
    RuntimeError,  # RecursionError and NotImplementedError too
)


class UnreadablePickleError(ValueError):
    """Say that a file is no pickle of tensors in plain containers, or asks to run code, none of which is run."""


def load_torch_pickle(path: Path, device: torch.device | None = None) -> Any:
    """Return what `torch.save` wrote, tensors in plain containers, mapped from the file where its format allows.

    Raises UnreadablePickleError for anything else.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, about older formats
            return torch.load(
                path,
                map_location=device or torch.get_default_device(),
                weights_only=True,
                mmap=zipfile.is_zipfile(path),
            )
    except _UNREADABLE as error:
        raise UnreadablePickleError(" ".join(str(error).split())) from error


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
    except _UNREADABLE as error:
        raise ValueError(f"{path} is not a pickle of numpy arrays alone and was not loaded: {error}") from error
