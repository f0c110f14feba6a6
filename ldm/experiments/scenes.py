"""TODO experiments.scenes."""

from __future__ import annotations

from PIL import Image
from collections.abc import Mapping, Sequence
import pandas as pd
from pathlib import Path
from ldm.config.concepts import EMPTY_PROMPT_LABEL, STATUSES, concept_status, erasable_concepts, get_concept
from ldm.config.scenes import SceneStep
from ldm.experiments.experiment import Experiment
from ldm.io.image_grid import image_grid
from ldm.io.images import image_filename, open_image
from ldm.io.paths import ArtifactPaths
from ldm.io.prompts import read_prompt_csv
from ldm.ledger.ledger import Ledger, make_header
from ldm.ledger.operations import shift_record
from ldm.metrics.lpips import mean_psnr


STATUS_PREFIXES = {"erased": "E ", "restored": "R ", "regular": ""}


STATUS_COLORS = {"erased": "crimson", "restored": "limegreen"}


def run_scene(experiment: Experiment, method: str, scene: int, moments: Sequence[SceneStep], root: Path, given: Mapping,
         everything: bool = False) -> tuple[pd.DataFrame, list[Path]]:
    """One method through a scene: a row for each time and prompt, and the folder of images of each time.

    Columns: method, time, prompt, status, then those of `compare`. Shifts are kept below `root`. Where the method can
    protect, it protects the concepts that the scene ever erases, or, with `everything`, all of the category. The moves are those of a
    ledger, `sceneN-CATEGORY-METHOD.jsonl` beside the shifts.
    """
    protected = sorted({index for moment in moments for index in moment.new})
    if everything:
        protected = [concept.index for concept in erasable_concepts(experiment.category)]
    binding = make_header(experiment.model, experiment.category, erasable_concepts(experiment.category), (), {})
    ledger = Ledger.create(root / f"scene{scene}-{experiment.category}-{method}.jsonl", binding, "begin")  # no clock: the same files in every run
    tables, folders = [], []
    for moment in moments:
        store = ArtifactPaths(root, method, experiment.model.name, experiment.category, scene, moment.time)
        entries, new = ledger.plan_erasure([get_concept(experiment.category, index) for index in moment.new], False)
        if new:
            experiment.learn(store, new, protected, given)
            entries |= {concept.index: shift_record(ledger, store, concept)[1] for concept in new}
        ledger.append(entries, set(ledger.state()) - set(moment.erased), f"t{moment.time}")
        shifts = ledger.shifts()
        table, folder = experiment.measure(shifts, f"{method}-{''.join(shifts)}")
        folders.append(folder)
        table.insert(0, "status", [concept_status(experiment.category, prompt, moment.erased, moment.restored) for prompt in table.prompt])
        table.insert(0, "time", moment.time)
        table.insert(0, "method", method)
        tables.append(table)
    return pd.concat(tables, ignore_index=True), folders


def summarize(table: pd.DataFrame, distance: str) -> pd.DataFrame:
    """The paper's Figures 8, 9, 13 and 14: means over the erased, restored, regular and protected prompts of each time."""
    groups = table.groupby(["method", "time", "status"], sort=False)
    means = groups.agg(accuracy_before=("accuracy_before", "mean"), accuracy=("accuracy_after", "mean"),
                       lpips=("lpips", "mean"), largest_pixel=("largest_pixel", "max"), psnr=("psnr", mean_psnr),
                       **{distance: (distance, "mean")}).reset_index()
    return means.sort_values(["method", "time", "status"], kind="stable", ignore_index=True,
                             key=lambda column: column.map(STATUSES.index) if column.name == "status" else
                             column.map(list(table.method.unique()).index) if column.name == "method" else column)


def wide_table(table: pd.DataFrame, category: str, distance: str) -> pd.DataFrame:
    """The paper's Tables 2 and 3: a row for each method and time, a cell `distance / accuracy / LPIPS` for each concept,
    marked E (erased) or R (restored), and `PSNR / LPIPS` for the watermarks and the blank prompt."""
    names = [concept.prompt for concept in erasable_concepts(category)]
    result = []
    for (method, time), group in table.groupby(["method", "time"], sort=False):
        row = {"method": method, "time": time}
        for line in group.itertuples():
            if line.prompt in names:
                far = getattr(line, distance)
                row[line.prompt] = (f"{STATUS_PREFIXES[line.status]}{far:.{0 if far >= 100 else 2}f} / {line.accuracy_after:.0f} / "
                                    f"{line.lpips:.3f}")
            else:
                row[line.prompt or EMPTY_PROMPT_LABEL] = f"{line.psnr:.1f} / {line.lpips:.1e}"
        result.append(row)
    return pd.DataFrame(result)


def scene_grid(experiment: Experiment, moments: Sequence[SceneStep], folders: Mapping[str, Sequence[Path]]) -> Image.Image:
    """Every prompt's first image by the original and by each method at each time, framed red where the concept stands
    erased and green where it is restored."""
    original = experiment.images({}, "")
    columns = [("original", original, None)]
    columns += [(f"{method if moment.time == 0 else ''}\nt{moment.time}", folder, moment)
                for method, places in folders.items() for moment, folder in zip(moments, places)]
    first = {}
    for case in read_prompt_csv(original / "prompts.csv"):
        first.setdefault(case.prompt, image_filename(case.number, 0))
    rows, frames = [], []
    for prompt, name in first.items():
        rows.append((prompt or EMPTY_PROMPT_LABEL, [[open_image(folder / name)] for _, folder, _ in columns]))
        frames.append([STATUS_COLORS.get(concept_status(experiment.category, prompt, moment.erased, moment.restored)) if moment else None
                       for _, _, moment in columns])
    return image_grid(rows, [title for title, _, _ in columns], frames=frames)
