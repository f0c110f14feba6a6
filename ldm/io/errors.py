"""Errors that a user can mend.

A message names the settings that it is about in backticks (`rank_rtol`), as the Python API calls them; the command line
turns these into the flags that its user typed, and adds the command that makes what is missing.
"""

from __future__ import annotations

import warnings


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
    """Give a `Notice`."""
    warnings.warn(message, Notice, stacklevel=2)
