"""Errors that a user can mend.

A message names the settings that it is about in backticks (`rank_rtol`), as the Python API calls them; the command line
turns these into the flags that its user typed, and adds the command that makes what is missing.
"""

from __future__ import annotations

import sys
import warnings

# Through these a user's own line comes to a notice, as through a pipeline of diffusers or a `with` block.
_NOT_THE_USERS = ("ldm", "contextlib", "diffusers", "torch")


class MissingFileError(ValueError):
    """Say that a file or folder is missing that another command makes.

    `kind` is what is missing: prompts, basis, shift, training images, generated images, classifier, classifier data,
    lpips weights or ledger. `details` is what the command needs to know to make it.
    """

    def __init__(self, message: str, kind: str, **details: object):
        super().__init__(message)
        self.kind = kind
        self.details = details


class NotErasedError(Exception):
    """Say, when all is written, that a shift does not do to its concept what may be called erased."""


class Notice(UserWarning):
    """Something that a user should know about and that stops nothing; the command line prints it as one line."""


def notify(message: str) -> None:
    """Give a `Notice` that points to the user's own line: the first one that is not of a library."""
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _NOT_THE_USERS:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, Notice, stacklevel=level)
