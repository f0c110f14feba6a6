"""TODO metrics.tables."""

from __future__ import annotations

import pandas as pd


def format_cell(value) -> str:
    """What stands in a table for a value: numbers with few digits, nothing for NaN."""
    if isinstance(value, float):
        return "" if value != value else f"{value:.4g}"
    return str(value)


def to_markdown(table: pd.DataFrame) -> str:
    """A table as Markdown."""
    lines = ["| " + " | ".join(table.columns) + " |", "|" + " --- |" * len(table.columns)]
    return "\n".join(lines + ["| " + " | ".join(map(format_cell, row)) + " |" for row in table.itertuples(index=False)])
