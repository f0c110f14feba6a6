"""Tables of results as Markdown and as JSON. No pandas and no torch at import, so that printing a table stays cheap."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
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


def _plain(value: Any) -> Any:
    """Return a cell as JSON has it: numbers unrounded; None for NaN, infinity and other missing values."""
    value = value.item() if hasattr(value, "item") else value  # NumPy's numbers
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)


def to_records(table: pd.DataFrame) -> list[dict[str, Any]]:
    """Return a table, without its index, as a mapping for each row."""
    rows = table.itertuples(index=False, name=None)
    return [dict(zip(map(str, table.columns), map(_plain, row), strict=True)) for row in rows]


def to_json(tables: Mapping[str, pd.DataFrame]) -> str:
    """Return tables by name as JSON: an object of lists of rows; a single table without a name as its list alone."""
    records = {name: to_records(table) for name, table in tables.items()}
    shown = records.get("", []) if set(records) <= {""} else records
    return json.dumps(shown, indent=2, ensure_ascii=False, allow_nan=False)
