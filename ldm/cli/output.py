"""What a script prints: tables, as Markdown or with --json as JSON, and other lines, which --quiet leaves out.

The flags turn a switch while a script parses its arguments; when `printing` ends, all switches are as before.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, redirect_stdout
from typing import TYPE_CHECKING, TextIO

from ldm.metrics.tables import to_json, to_markdown

if TYPE_CHECKING:
    import pandas as pd

_NO_BARS = "TQDM_DISABLE"  # read by tqdm when it is imported, and inherited by other processes


class _Page:
    """Where the tables and lines of a script go: the tables to `stdout`, whatever becomes of other lines."""

    def __init__(self, stdout: TextIO | None):
        self.stdout = stdout
        self.as_json = False
        self.is_empty = True
        self.tables: dict[str, pd.DataFrame] = {}
        self.undo = ExitStack()

    def print(self, text: str) -> None:
        """Print where tables go."""
        print(text, file=self.stdout, flush=True)


_page = _Page(None)  # of no script: print goes to stdout, as ever


@contextmanager
def printing() -> Iterator[None]:
    """While the block runs, heed the switches; then print the tables that --json has collected.

    They are printed after an error too if there are any, as Markdown would have been.
    """
    global _page
    _page, done = _Page(sys.stdout), False
    try:
        yield
        done = True
    finally:
        page, _page = _page, _Page(None)
        page.undo.close()
        if page.as_json and (done or page.tables):
            page.print(to_json(page.tables))


def be_quiet() -> None:
    """Leave out progress bars, and all lines on stdout but those of tables and answers."""
    if _NO_BARS not in os.environ:
        os.environ[_NO_BARS] = "1"
        _page.undo.callback(os.environ.pop, _NO_BARS, None)
    nowhere = _page.undo.enter_context(open(os.devnull, "w"))  # noqa: SIM115 - the stack closes it
    _page.undo.enter_context(redirect_stdout(nowhere))


def print_json() -> None:
    """Collect tables for JSON on stdout, where nothing else is printed: other lines go to stderr."""
    _page.as_json = True
    if sys.stdout is _page.stdout:  # and not silenced by --quiet
        _page.undo.enter_context(redirect_stdout(sys.stderr))


def show_table(table: pd.DataFrame, name: str = "", title: str = "") -> None:
    """Print a table below its title. A script that shows several names each: JSON has them by name.

    A table without rows is shown in JSON alone.
    """
    if not len(table):
        show_tables("", {name: table})
    else:
        show_tables(f"{title}\n\n{to_markdown(table)}" if title else to_markdown(table), {name: table})


def show_tables(text: str, tables: Mapping[str, pd.DataFrame]) -> None:
    """Print a text that has several tables, or in JSON these: a later table replaces an earlier one of its name."""
    if _page.as_json:
        _page.tables.update(tables)
    elif text:
        _page.print(text if _page.is_empty else f"\n{text}")
        _page.is_empty = False


def show_answer(text: str) -> None:
    """Print a line that was asked for, also with --quiet."""
    _page.print(text)
