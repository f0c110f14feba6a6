"""TODO experiments.plots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
import numpy as np
import pandas as pd
from pathlib import Path
from ldm.io.files import atomic_write


def plot_lines(table: pd.DataFrame, x: str, measures: Mapping[str, str], by: str, path: Path, rows: str | None = None,
          order: Sequence[str] = (), log: bool = False, title: str = "") -> None:
    """Write a picture with a column of panels for each of `measures` (column -> label) and a row for each value of `rows`.

    Each value of `by` is a line over `x`; `order` puts the rows in order; `log` makes x logarithmic, with room for 0.
    """
    kinds = [kind for kind in order or (table[rows].unique() if rows else [""]) if not rows or (table[rows] == kind).any()]
    figure = Figure(figsize=(4.2 * len(measures), 2.6 * len(kinds) + 0.8), layout="constrained")
    panels = figure.subplots(len(kinds), len(measures), squeeze=False)
    for line, kind in zip(panels, kinds):
        part = table[table[rows] == kind] if rows else table
        for panel, (measure, label) in zip(line, measures.items()):
            for k, (name, group) in enumerate(part.groupby(by, sort=False)):
                group = group.dropna(subset=[measure])
                style = "--" if k % 2 else "-"  # so that a line below another of the same values shows
                panel.plot(group[x], group[measure], style, marker="o", markersize=4, label=str(name))
            panel.set_title(f"{label}, {kind}" if kind else label, fontsize=10)
            panel.set_xlabel(x)
            panel.grid(alpha=0.3)
            if part[measure].isna().all():
                panel.set_axis_off()
                panel.set_title("")
            if log:
                panel.set_xscale("symlog", linthresh=table[x][table[x] > 0].min())
            elif pd.api.types.is_integer_dtype(table[x]):
                panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    handles = {label: handle for panel in panels.flat for handle, label in zip(*panel.get_legend_handles_labels())}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=min(2 * len(measures), len(handles)))
    figure.suptitle(title)
    with atomic_write(path) as partial:
        figure.savefig(partial, dpi=110)


def plot_spectrum(values: Sequence[float], table: pd.DataFrame, path: Path) -> None:
    """Write a picture of a spectrum, relative singular values in order, with the tolerances of a `capacity` table across it, and of
    the table's leaks and least reach over them."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.semilogy(range(1, len(values) + 1), values, color="black")
    left.set_ylim(max(min(value for value in values if value), 1e-9), 1.5)
    for row in table.itertuples():
        left.axhline(row.tolerance, color="grey", linewidth=0.8)
        left.text(len(values), row.tolerance, f"{row.tolerance:g}: room {row.room}", fontsize=8, ha="right", va="bottom")
    left.set(title="singular values of the protected prompts", xlabel="direction")
    for measure, label in (("leak_protected", "largest leak, protected"), ("leak_held_out", "largest leak, held-out templates"),
                           ("least_reach", "least reach of a concept")):
        if (table[measure] > 0).any():
            right.loglog(table.tolerance, table[measure], marker="o", label=label)
    right.set(title="what a tolerance costs and gives", xlabel="tolerance")
    right.legend(fontsize=8)
    for panel in (left, right):
        panel.grid(alpha=0.3)
    with atomic_write(path) as partial:
        figure.savefig(partial, dpi=110)


def plot_heatmap(table: pd.DataFrame, label: str, path: Path) -> None:
    """Write a picture of a table of numbers above 0, rows by columns, dark where they are large, on a logarithmic scale."""
    values = table.to_numpy(dtype=float)
    figure = Figure(figsize=(2.6 + 0.62 * values.shape[1], 1.8 + 0.34 * values.shape[0]), layout="constrained")
    panel = figure.subplots()
    shown = panel.imshow(values.clip(1e-9), norm=LogNorm(1e-9, max(1.0, values.max())), cmap="magma_r", aspect="auto")
    for (row, column), value in np.ndenumerate(values):
        panel.text(column, row, f"{value:.0e}" if value < 0.01 else f"{value:.2f}", ha="center", va="center", fontsize=7,
                   color="white" if value > 1e-4 else "black")
    panel.set_xticks(range(len(table.columns)), table.columns, rotation=45, ha="right", fontsize=8)
    panel.set_yticks(range(len(table.index)), table.index, fontsize=8)
    figure.colorbar(shown, label=label)
    with atomic_write(path) as partial:
        figure.savefig(partial, dpi=110)


def plot_timeline(rows: Mapping[str, Sequence[tuple[float, float]]], ticks: Mapping[float, str], path: Path) -> None:
    """Write a picture of when each of `rows` was on: bars from one number to another, with `ticks` below."""
    figure = Figure(figsize=(9, 1.2 + 0.32 * len(rows)), layout="constrained")
    panel = figure.subplots()
    for k, parts in enumerate(rows.values()):
        panel.broken_barh([(first, last - first) for first, last in parts], (k - 0.35, 0.7), color="crimson")
    panel.set_yticks(range(len(rows)), rows, fontsize=9)
    panel.set_xticks(list(ticks), list(ticks.values()), rotation=45, ha="right", fontsize=8)
    panel.set_xlim(min(ticks), max(ticks))
    panel.set_ylim(len(rows) - 0.5, -0.5)
    panel.grid(axis="x", alpha=0.3)
    with atomic_write(path) as partial:
        figure.savefig(partial, dpi=110)
