"""A scene played through time as an owner would: concepts erased and given back, no shift ever made twice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd
from PIL import Image

from ldm.concepts import BLANK, STATUSES, Moment, erasable, get_concept, status
from ldm.experiment import Experiment
from ldm.images import image_name, open_image, read_cases, sheet
from ldm.ledger import Ledger, bind, describe
from ldm.metrics.perceptual import mean_psnr
from ldm.store import Store

MARKS = {"erased": "E ", "restored": "R ", "regular": ""}
FRAMES = {"erased": "crimson", "restored": "limegreen"}


def play(experiment: Experiment, method: str, scene: int, moments: Sequence[Moment], root: Path, given: Mapping,
         everything: bool = False) -> tuple[pd.DataFrame, list[Path]]:
    """One method through a scene: a row for each time and prompt, and the folder of images of each time.

    Columns: method, time, prompt, status, then those of `compare`. Shifts are kept below `root`. Where the method can
    protect, it protects the concepts that the scene ever erases, or, with `everything`, all of the category. The moves are those of a
    ledger, `sceneN-CATEGORY-METHOD.jsonl` beside the shifts.
    """
    protected = sorted({index for moment in moments for index in moment.new})
    if everything:
        protected = [concept.index for concept in erasable(experiment.category)]
    binding = bind(experiment.model, experiment.category, erasable(experiment.category), (), {})
    ledger = Ledger.create(root / f"scene{scene}-{experiment.category}-{method}.jsonl", binding, "begin")  # no clock: the same files in every run
    tables, folders = [], []
    for moment in moments:
        store = Store(root, method, experiment.model.name, experiment.category, scene, moment.time)
        entries, new = ledger.due([get_concept(experiment.category, index) for index in moment.new], False)
        if new:
            experiment.learn(store, new, protected, given)
            entries |= {concept.index: describe(ledger, store, concept)[1] for concept in new}
        ledger.append(entries, set(ledger.state()) - set(moment.erased), f"t{moment.time}")
        shifts = ledger.shifts()
        table, folder = experiment.measure(shifts, f"{method}-{''.join(shifts)}")
        folders.append(folder)
        table.insert(0, "status", [status(experiment.category, prompt, moment.erased, moment.restored) for prompt in table.prompt])
        table.insert(0, "time", moment.time)
        table.insert(0, "method", method)
        tables.append(table)
    return pd.concat(tables, ignore_index=True), folders


def averages(table: pd.DataFrame, distance: str) -> pd.DataFrame:
    """The paper's Figures 8, 9, 13 and 14: means over the erased, restored, regular and protected prompts of each time."""
    groups = table.groupby(["method", "time", "status"], sort=False)
    means = groups.agg(accuracy_before=("accuracy_before", "mean"), accuracy=("accuracy_after", "mean"),
                       lpips=("lpips", "mean"), largest_pixel=("largest_pixel", "max"), psnr=("psnr", mean_psnr),
                       **{distance: (distance, "mean")}).reset_index()
    return means.sort_values(["method", "time", "status"], kind="stable", ignore_index=True,
                             key=lambda column: column.map(STATUSES.index) if column.name == "status" else
                             column.map(list(table.method.unique()).index) if column.name == "method" else column)


def wide(table: pd.DataFrame, category: str, distance: str) -> pd.DataFrame:
    """The paper's Tables 2 and 3: a row for each method and time, a cell `distance / accuracy / LPIPS` for each concept,
    marked E (erased) or R (restored), and `PSNR / LPIPS` for the watermarks and the blank prompt."""
    names = [concept.prompt for concept in erasable(category)]
    result = []
    for (method, time), group in table.groupby(["method", "time"], sort=False):
        row = {"method": method, "time": time}
        for line in group.itertuples():
            if line.prompt in names:
                far = getattr(line, distance)
                row[line.prompt] = (f"{MARKS[line.status]}{far:.{0 if far >= 100 else 2}f} / {line.accuracy_after:.0f} / "
                                    f"{line.lpips:.3f}")
            else:
                row[line.prompt or BLANK] = f"{line.psnr:.1f} / {line.lpips:.1e}"
        result.append(row)
    return pd.DataFrame(result)


def picture(experiment: Experiment, moments: Sequence[Moment], folders: Mapping[str, Sequence[Path]]) -> Image.Image:
    """Every prompt's first image by the original and by each method at each time, framed red where the concept stands
    erased and green where it is restored."""
    original = experiment.images({}, "")
    columns = [("original", original, None)]
    columns += [(f"{method if moment.time == 0 else ''}\nt{moment.time}", folder, moment)
                for method, places in folders.items() for moment, folder in zip(moments, places)]
    first = {}
    for case in read_cases(original / "prompts.csv"):
        first.setdefault(case.prompt, image_name(case.number, 0))
    rows, frames = [], []
    for prompt, name in first.items():
        rows.append((prompt or BLANK, [[open_image(folder / name)] for _, folder, _ in columns]))
        frames.append([FRAMES.get(status(experiment.category, prompt, moment.erased, moment.restored)) if moment else None
                       for _, _, moment in columns])
    return sheet(rows, [title for title, _, _ in columns], frames=frames)
