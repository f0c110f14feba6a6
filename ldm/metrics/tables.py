"""Tables of results as Markdown. No pandas and no torch at import, so that printing a table stays cheap."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd


def format_cell(value: Any) -> str:
    """Return what a table shows for a value: a float with four significant digits, nothing for NaN, else its text."""
    if isinstance(value, float):
        return "" if value != value else f"{value:.4g}"
    return str(value)


def _in_one_line(value: Any) -> str:
    """Return a cell of a Markdown table, which ends neither the cell nor the line."""
    return " ".join(format_cell(value).splitlines()).replace("|", "\\|")


def to_markdown(table: pd.DataFrame) -> str:
    """Return a table, without its index, as Markdown."""
    header = "| " + " | ".join(table.columns) + " |"
    rule = "|" + " --- |" * len(table.columns)
    rows = ["| " + " | ".join(map(_in_one_line, row)) + " |" for row in table.itertuples(index=False)]
    return "\n".join([header, rule, *rows])
