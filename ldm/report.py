"""One self-contained HTML page about a ledger: what was erased and given back when, pictures, tables, plots, and how to make it again."""

from __future__ import annotations

import base64
import shlex
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
from jinja2 import Environment

from ldm.attention import kv_layers
from ldm.capacity import TOLERANCES, capacity
from ldm.concepts import BLANK, STATUSES, status, watermarks
from ldm.experiment import Experiment
from ldm.images import image_name, open_image, read_cases, save_image, sheet
from ldm.ledger import Ledger, peak_memory, table, verify
from ldm.metrics.compare import cell
from ldm.model import settings
from ldm.plots import heat, lines, room, spans
from ldm.shift import leaks


@dataclass
class Section:
    """A part of the page: a heading, what it says, tables, pictures as (data URI, what they show), and commands."""

    title: str
    text: str = ""
    tables: list[pd.DataFrame] = field(default_factory=list)
    pictures: list[tuple[str, str]] = field(default_factory=list)
    commands: list[str] = field(default_factory=list)


def report(ledger: Ledger, experiment: Experiment, num_shown: int) -> str:
    """The page as HTML. `experiment` draws the original's pictures and the present state's, on the same seeds; `num_shown` of each
    prompt are shown. Raises ValueError for a ledger that `verify` does."""
    start, model = time.perf_counter(), experiment.model
    proved = verify(ledger, model)
    shifts = ledger.shifts()
    erased = list(ledger.state())
    restored = [concept.index for concept in ledger.concepts if ledger.last_shift(concept.index) and concept.index not in erased]
    results, folder = experiment.measure(shifts, "now")
    original = experiment.images({}, "")
    results.insert(0, "status", [status(experiment.category, prompt, erased, restored) for prompt in results.prompt])
    results = results.sort_values("status", key=lambda kinds: kinds.map(STATUSES.index), kind="stable")
    picture = _picture(original, folder, results, num_shown)
    results = results.replace({"prompt": {"": BLANK}})
    marks = results[results.status == "protected"]
    own = settings(model.base)
    found = capacity(model, ledger.concepts, own.solution.templates, own.solution.always, TOLERANCES, own.erasure["SRS-ME"])
    sections = [
        Section("What is erased", f"{ledger.binding['base']}, digest {model.digest[:12]}. {len(erased)} of {len(ledger.concepts)} concepts are "
                "erased.", [table(ledger)]),
        Section("When", "", [pd.DataFrame({"history": ledger.story()})],
                [_plot(lambda path: _spans(ledger, path), "bars over time: when each concept was erased")] if ledger.changes else []),
        Section("Before and after", "The original on the left, the present state on the right, from the same seeds.", [], [picture]),
        Section("Results", "Accuracies in per cent by the classifier, distances between the two pictures of a seed.", [results]),
        Section("Watermarks and the blank prompt", f"They must not move: no pixel of {int(marks.images.sum())} pictures is off by more than "
                f"{int(marks.largest_pixel.max())} of 255.", [marks[["prompt", "images", "lpips", "psnr", "largest_pixel"]]]),
        _leaks(ledger, experiment),
        _curves(ledger),
        Section("Capacity", "What the prompts of all concepts leave free at several tolerances, and what each tolerance costs.", [found.table],
                [_plot(lambda path: room(found.values.tolist(), found.table, path), "the spectrum of the protected prompts, and leaks by "
                       "tolerance")])]
    spent = pd.DataFrame([{"erased": entry["concept"], "at": change.time, "seconds": entry.get("seconds", ""),
                           "peak GiB": entry.get("peak_gib", "")} for change in ledger.changes for entry in change.erase.values()])
    sections += [
        Section("Time and memory", f"Erasures with all that was erased by the same command. This page took {time.perf_counter() - start:.0f} s "
                f"and at most {peak_memory() / 2**30:.2f} GiB.", [spent]),
        Section("Made again", "Every digest was recomputed for this page.", [proved], commands=commands(ledger))]
    template = Environment(autoescape=True).from_string((Path(__file__).parent / "report.html").read_text())
    return template.render(title=f"{ledger.binding['base']}: {len(erased)} concepts erased", sections=sections, cell=cell)


def commands(ledger: Ledger) -> list[str]:
    """What makes the same history again, from nothing."""
    binding, script = ledger.binding, ["python", "train-scripts/ledger.py"]
    root = ["--root", str(ledger.root)]
    source = [piece for name in ("model", "ckpt_path", "config_path") if binding.get(name)
              for piece in (f"--{name}", binding[name])]
    also = [prompt for prompt in binding["protected"] if prompt not in ("", *watermarks())]
    made = [shlex.join([*script, "init", *root, *source, "--erase_cat", binding["erase_cat"], "--concepts",
                        ",".join(map(str, binding["concepts"])), *(["--protect", *also] if also else [])])]
    known = set()
    for change in ledger.changes:
        if change.restore:
            made.append(shlex.join([*script, "restore", *root, *map(str, change.restore)]))
        together: dict[tuple, list[str]] = {}  # what was erased in the same way, as a joint method needs it
        for index, entry in change.erase.items():
            given = {} if entry["digest"] in known else {"method": entry["method"], **ledger.load(entry).recipe.get("arguments", {})}
            flags = [piece for name, value in given.items() if value is not None for piece in (f"--{name}", str(value))]
            together.setdefault(tuple(flags), []).append(str(index))
            known.add(entry["digest"])
        made += [shlex.join([*script, "erase", *root, *names, *flags]) for flags, names in together.items()]
    return made


def _plot(draw: Callable[[Path], None], shows: str) -> tuple[str, str]:
    """What `draw` writes to a path as (data URI, what it shows)."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "plot.png"
        draw(path)
        return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}", shows


def _picture(original: Path, present: Path, results: pd.DataFrame, num_shown: int) -> tuple[str, str]:
    cases, rows = read_cases(present / "prompts.csv"), []
    for prompt, kind in zip(results.prompt, results.status):
        names = [image_name(case.number, 0) for case in cases if case.prompt == prompt][:num_shown]
        rows.append((f"{prompt or BLANK} ({kind})", [[open_image(folder / name) for name in names] for folder in (original, present)]))
    shows = "pictures before and after, a row for each prompt: " + "; ".join(label for label, _ in rows)
    return _plot(lambda path: save_image(path, sheet(rows, ["original", "present state"])), shows)


def _spans(ledger: Ledger, path: Path) -> None:
    """Bars over the numbers of the history's lines, the last of which ends where the history does."""
    last = len(ledger.changes) + 1
    states = {number: set(ledger.state(number)) for number in range(1, last)}
    rows = {concept.name: [(number, number + 1) for number, on in states.items() if concept.index in on] for concept in ledger.concepts}
    spans(rows, {change.number: change.time[:16].replace("T", " ") for change in ledger.changes} | {last: "now"}, path)


def _leaks(ledger: Ledger, experiment: Experiment) -> Section:
    """How far each shift that was ever on moves each prompt."""
    entries = ledger.last_shifts()
    text = "How far each shift moves what the key and value layers put out for each prompt, relatively. A concept's own shift must move " \
           "it; the others, and the protected prompts, must stay."
    if not entries:
        return Section("Leaks", "No concept was ever erased.")
    rows = leaks(kv_layers(experiment.model.unet), {name: ledger.load(entry) for name, entry in entries.items()},
                 experiment.model.seen(ledger.prompts))
    matrix = pd.DataFrame(rows).pivot(index="prompt", columns="shift", values="leak").loc[ledger.prompts, list(entries)]
    matrix = matrix.rename(index={"": BLANK})
    return Section("Leaks", text, [], [_plot(lambda path: heat(matrix, "leak", path), "a heat map of leaks, a row for each prompt and a column "
                                             "for each shift")])


def _curves(ledger: Ledger) -> Section:
    """Loss and momentum of each erasure that learnt."""
    curves = []
    for name, entry in ledger.last_shifts().items():
        path = (ledger.root / entry["shift"]).with_suffix(".csv")
        if path.is_file() and entry["steps"]:
            curves.append(pd.read_csv(path).assign(concept=name))
    if not curves:
        return Section("Curves", "Nothing was learnt: all shifts are closed forms.")
    table = pd.concat(curves, ignore_index=True)
    return Section("Curves", "", [], [_plot(lambda path: lines(table, "step", {"loss": "loss", "momentum": "momentum"}, "concept", path),
                                            "loss and momentum of each erasure by step")])
