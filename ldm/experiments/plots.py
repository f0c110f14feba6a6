"""Plots of results: a grid of lines, one panel for each metric and group; a spectrum; a heat map; bars over time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ldm.io.files import atomic_write


@dataclass(frozen=True)
class LinePlot:
    """What `plot_lines` shows of a table: each value of the column `by` as a line over the column `x`.

    There is a column of panels for each of `metrics` (column -> label), and a row of panels for each value of the
    column `rows`, of those in `row_order` if it is given. `log_x` makes x logarithmic, with room for 0.
    """

    x: str
    by: str
    metrics: Mapping[str, str]
    rows: str | None = None
    row_order: Sequence[str] = ()
    log_x: bool = False
    title: str = ""


def plot_lines(table: pd.DataFrame, plot: LinePlot, path: Path) -> None:
    """Write an image of a table as a grid of lines."""
    parts = _split_rows(table, plot)
    num_columns = len(plot.metrics)
    figure = Figure(figsize=(4.2 * num_columns, 2.6 * len(parts) + 0.8), layout="constrained")
    panels = figure.subplots(len(parts), num_columns, squeeze=False)
    for line, (name, part) in zip(panels, parts.items()):
        for panel, (column, label) in zip(line, plot.metrics.items()):
            _draw_lines(panel, part, plot, column)
            panel.set_title(f"{label}, {name}" if name else label, fontsize=10)
            if part[column].isna().all():
                panel.set_axis_off()
                panel.set_title("")
            if plot.log_x:
                panel.set_xscale("symlog", linthresh=table[plot.x][table[plot.x] > 0].min())
            elif pd.api.types.is_integer_dtype(table[plot.x]):
                panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    handles: dict[str, Any] = {}
    for panel in panels.flat:
        lines, labels = panel.get_legend_handles_labels()
        handles |= dict(zip(labels, lines))
    num_legend_columns = min(2 * num_columns, len(handles))
    figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=num_legend_columns)
    figure.suptitle(plot.title)
    _save(figure, path)


def _split_rows(table: pd.DataFrame, plot: LinePlot) -> dict[str, pd.DataFrame]:
    """Return the part of a table that each row of panels shows; all of it, under an empty name, for one row."""
    if not plot.rows:
        return dict.fromkeys(plot.row_order or [""], table)
    parts = {}
    for name in plot.row_order or table[plot.rows].unique():
        part = table[table[plot.rows] == name]
        if len(part):
            parts[name] = part
    return parts


def _draw_lines(panel: Axes, part: pd.DataFrame, plot: LinePlot, column: str) -> None:
    for number, (name, group) in enumerate(part.groupby(plot.by, sort=False)):
        group = group.dropna(subset=[column])
        style = "--" if number % 2 else "-"  # so that a line below another of the same values shows
        panel.plot(group[plot.x], group[column], style, marker="o", markersize=4, label=str(name))
    panel.set_xlabel(plot.x)
    panel.grid(alpha=0.3)


def plot_tradeoff(table: pd.DataFrame, x: tuple[str, str], metrics: Mapping[str, str], path: Path) -> None:
    """Write an image of each of `metrics` (column -> label) against the column x, which has its label beside it.

    The rows of one value of the column `line` are joined in their order.
    """
    column, label = x
    figure = Figure(figsize=(4.6 * len(metrics), 4.6), layout="constrained")
    panels = figure.subplots(1, len(metrics), squeeze=False)[0]
    for panel, (metric, title) in zip(panels, metrics.items(), strict=True):
        for number, (name, part) in enumerate(table.groupby("line", sort=False)):
            marker = "os^Dv*Ph"[number % 8]
            panel.plot(part[column], part[metric], "-", marker=marker, markersize=7, label=str(name))
        panel.set(xlabel=label, title=title)
        panel.grid(alpha=0.3)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4)
    _save(figure, path)


def plot_robustness(table: pd.DataFrame, path: Path) -> None:
    """Write an image of the shares in which probes found a concept: a panel for each probe, a bar for each contender.

    A bar is the mean over a probe's kinds, with the least and the largest as a line; the unedited model's mean and the
    floor's are lines across.
    """
    shares = table[(table["measure"] == "shown") & (table["note"] == "") & (table["kind"] != "all kinds")]
    probes = list(shares["probe"].unique())
    figure = Figure(
        figsize=(4.2 * min(3, max(1, len(probes))), 3.2 * max(1, -(-len(probes) // 3))), layout="constrained"
    )
    panels = figure.subplots(max(1, -(-len(probes) // 3)), min(3, max(1, len(probes))), squeeze=False).flatten()
    for panel in panels[len(probes) :]:
        panel.set_axis_off()
    for panel, probe in zip(panels, probes):
        part = shares[shares["probe"] == probe]
        groups = part.groupby("contender", sort=False)["value"]
        means, lows, highs = 100 * groups.mean(), 100 * groups.min(), 100 * groups.max()
        errors = [(means - lows).clip(lower=0), (highs - means).clip(lower=0)]  # which rounding may make negative
        panel.barh(list(means.index), means, xerr=errors, color="steelblue", error_kw={"linewidth": 1})
        panel.axvline(100 * part["unedited"].mean(), color="black", linewidth=1, label="unedited")
        panel.axvline(100 * part["floor"].mean(), color="crimson", linewidth=1, linestyle="--", label="floor")
        panel.set(xlim=(0, 102), title=probe, xlabel="images that show the concept, %")
        panel.invert_yaxis()
        panel.tick_params(labelsize=8)
    if probes:
        panels[0].legend(fontsize=8)
    _save(figure, path)


def plot_spectrum(singular_values: Sequence[float], table: pd.DataFrame, path: Path) -> None:
    """Write an image of a capacity report: singular values, and what each tolerance costs and gives.

    `singular_values` (d,) are relative to the largest, in order; `table` is that of `CapacityReport`.
    """
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.semilogy(range(1, len(singular_values) + 1), singular_values, color="black")
    left.set_ylim(max(min(value for value in singular_values if value), 1e-9), 1.5)
    for tolerance, nullity in zip(table["tolerance"], table["nullity"]):
        left.axhline(tolerance, color="grey", linewidth=0.8)
        text = f"{tolerance:g}: nullity {nullity}"
        left.text(len(singular_values), tolerance, text, fontsize=8, ha="right", va="bottom")
    left.set(title="singular values of the protected prompts", xlabel="direction")
    labels = {
        "max_leakage_protected": "max leakage, protected prompts",
        "max_leakage_held_out": "max leakage, held-out templates",
        "min_projection": "min projection of a concept",
    }
    for column, label in labels.items():
        if (table[column] > 0).any():
            right.loglog(table["tolerance"], table[column], marker="o", label=label)
    right.set(title="what a tolerance costs and gives", xlabel="tolerance")
    right.legend(fontsize=8)
    for panel in (left, right):
        panel.grid(alpha=0.3)
    _save(figure, path)


def plot_heatmap(table: pd.DataFrame, label: str, path: Path) -> None:
    """Write an image of a table of numbers above 0: dark where they are large, on a logarithmic scale."""
    values = table.to_numpy(dtype=float)
    figure = Figure(figsize=(2.6 + 0.62 * values.shape[1], 1.8 + 0.34 * values.shape[0]), layout="constrained")
    panel = figure.subplots()
    norm = LogNorm(1e-9, max(1.0, values.max()))
    heatmap = panel.imshow(values.clip(1e-9), norm=norm, cmap="magma_r", aspect="auto")
    for (row, column), value in np.ndenumerate(values):
        text = f"{value:.0e}" if value < 0.01 else f"{value:.2f}"
        color = "white" if value > 1e-4 else "black"
        panel.text(column, row, text, ha="center", va="center", fontsize=7, color=color)
    panel.set_xticks(range(len(table.columns)), table.columns, rotation=45, ha="right", fontsize=8)
    panel.set_yticks(range(len(table.index)), table.index, fontsize=8)
    figure.colorbar(heatmap, label=label)
    _save(figure, path)


def plot_timeline(rows: Mapping[str, Sequence[tuple[float, float]]], ticks: Mapping[float, str], path: Path) -> None:
    """Write an image of when each of `rows` was active: bars from one number to another, with `ticks` below."""
    figure = Figure(figsize=(9, 1.2 + 0.32 * len(rows)), layout="constrained")
    panel = figure.subplots()
    for number, spans in enumerate(rows.values()):
        bars = [(first, last - first) for first, last in spans]
        panel.broken_barh(bars, (number - 0.35, 0.7), color="crimson")
    panel.set_yticks(range(len(rows)), list(rows), fontsize=9)
    panel.set_xticks(list(ticks), list(ticks.values()), rotation=45, ha="right", fontsize=8)
    panel.set_xlim(min(ticks), max(ticks))
    panel.set_ylim(len(rows) - 0.5, -0.5)
    panel.grid(axis="x", alpha=0.3)
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    with atomic_write(path) as partial:
        figure.savefig(partial, dpi=110)
