"""TODO experiments.report."""

from __future__ import annotations

import base64
from collections.abc import Callable
from dataclasses import dataclass, field
from jinja2 import Environment
import pandas as pd
from pathlib import Path
import shlex
import tempfile
import time
from ldm.config.concepts import EMPTY_PROMPT_LABEL, STATUSES, concept_status, watermark_prompts
from ldm.config.models import load_model_config
from ldm.diffusion.text_layers import text_layers
from ldm.erasure.capacity import DEFAULT_TOLERANCES, measure_capacity
from ldm.erasure.leakage import leakage
from ldm.experiments.experiment import Experiment
from ldm.experiments.plots import plot_heatmap, plot_lines, plot_spectrum, plot_timeline
from ldm.io.image_grid import image_grid
from ldm.io.images import image_filename, open_image, save_image
from ldm.io.prompts import read_prompt_csv
from ldm.ledger.ledger import Ledger, status_table
from ldm.ledger.operations import peak_memory, verify
from ldm.metrics.tables import format_cell


@dataclass
class Section:
    """A part of the page: a heading, what it says, tables, pictures as (data URI, what they show), and commands."""

    title: str
    text: str = ""
    tables: list[pd.DataFrame] = field(default_factory=list)
    pictures: list[tuple[str, str]] = field(default_factory=list)
    reproduction_commands: list[str] = field(default_factory=list)


def render_report(ledger: Ledger, experiment: Experiment, num_shown: int) -> str:
    """The page as HTML. `experiment` draws the original's pictures and the present state's, on the same seeds; `num_shown` of each
    prompt are shown. Raises ValueError for a ledger that `verify` does."""
    start, model = time.perf_counter(), experiment.model
    proved = verify(ledger, model)
    shifts = ledger.shifts()
    erased = list(ledger.state())
    restored = [concept.index for concept in ledger.concepts if ledger.last_shift(concept.index) and concept.index not in erased]
    results, folder = experiment.measure(shifts, "now")
    original = experiment.images({}, "")
    results.insert(0, "status", [concept_status(experiment.category, prompt, erased, restored) for prompt in results.prompt])
    results = results.sort_values("status", key=lambda kinds: kinds.map(STATUSES.index), kind="stable")
    picture = _before_and_after(original, folder, results, num_shown)
    results = results.replace({"prompt": {"": EMPTY_PROMPT_LABEL}})
    marks = results[results.status == "protected"]
    own = load_model_config(model.base)
    found = measure_capacity(model, ledger.concepts, own.solution.templates, own.solution.always, DEFAULT_TOLERANCES, own.erasure["SRS-ME"])
    sections = [
        Section("What is erased", f"{ledger.header['base']}, digest {model.digest[:12]}. {len(erased)} of {len(ledger.concepts)} concepts are "
                "erased.", [status_table(ledger)]),
        Section("When", "", [pd.DataFrame({"history": ledger.history_lines()})],
                [_embed_plot(lambda path: _timeline(ledger, path), "bars over time: when each concept was erased")] if ledger.entries else []),
        Section("Before and after", "The original on the left, the present state on the right, from the same seeds.", [], [picture]),
        Section("Results", "Accuracies in per cent by the classifier, distances between the two pictures of a seed.", [results]),
        Section("Watermarks and the blank prompt", f"They must not move: no pixel of {int(marks.images.sum())} pictures is off by more than "
                f"{int(marks.largest_pixel.max())} of 255.", [marks[["prompt", "images", "lpips", "psnr", "largest_pixel"]]]),
        _leakage_section(ledger, experiment),
        _curves_section(ledger),
        Section("Capacity", "What the prompts of all concepts leave free at several tolerances, and what each tolerance costs.", [found.table],
                [_embed_plot(lambda path: plot_spectrum(found.values.tolist(), found.table, path), "the spectrum of the protected prompts, and leaks by "
                       "tolerance")])]
    spent = pd.DataFrame([{"erased": entry["concept"], "at": change.time, "seconds": entry.get("seconds", ""),
                           "peak GiB": entry.get("peak_gib", "")} for change in ledger.entries for entry in change.erase.values()])
    sections += [
        Section("Time and memory", f"Erasures with all that was erased by the same command. This page took {time.perf_counter() - start:.0f} s "
                f"and at most {peak_memory() / 2**30:.2f} GiB.", [spent]),
        Section("Made again", "Every digest was recomputed for this page.", [proved], commands=reproduction_commands(ledger))]
    template = Environment(autoescape=True).from_string((Path(__file__).parent / "report.html").read_text())
    return template.render(title=f"{ledger.header['base']}: {len(erased)} concepts erased", sections=sections, cell=format_cell)


def reproduction_commands(ledger: Ledger) -> list[str]:
    """What makes the same history again, from nothing."""
    binding, script = ledger.header, ["python", "train-scripts/ledger.py"]
    root = ["--root", str(ledger.root)]
    source = [piece for name in ("model", "ckpt_path", "config_path") if binding.get(name)
              for piece in (f"--{name}", binding[name])]
    also = [prompt for prompt in binding["protected"] if prompt not in ("", *watermark_prompts())]
    made = [shlex.join([*script, "init", *root, *source, "--erase_cat", binding["erase_cat"], "--concepts",
                        ",".join(map(str, binding["concepts"])), *(["--protect", *also] if also else [])])]
    known = set()
    for change in ledger.entries:
        if change.restore:
            made.append(shlex.join([*script, "restore", *root, *map(str, change.restore)]))
        together: dict[tuple, list[str]] = {}  # what was erased in the same way, as a joint method needs it
        for index, entry in change.erase.items():
            given = {} if entry["digest"] in known else {"method": entry["method"], **ledger.load(entry).metadata.get("arguments", {})}
            flags = [piece for name, value in given.items() if value is not None for piece in (f"--{name}", str(value))]
            together.setdefault(tuple(flags), []).append(str(index))
            known.add(entry["digest"])
        made += [shlex.join([*script, "erase", *root, *names, *flags]) for flags, names in together.items()]
    return made


def _embed_plot(draw: Callable[[Path], None], shows: str) -> tuple[str, str]:
    """What `draw` writes to a path as (data URI, what it shows)."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "plot.png"
        draw(path)
        return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}", shows


def _before_and_after(original: Path, present: Path, results: pd.DataFrame, num_shown: int) -> tuple[str, str]:
    cases, rows = read_prompt_csv(present / "prompts.csv"), []
    for prompt, kind in zip(results.prompt, results.status):
        names = [image_filename(case.number, 0) for case in cases if case.prompt == prompt][:num_shown]
        rows.append((f"{prompt or EMPTY_PROMPT_LABEL} ({kind})", [[open_image(folder / name) for name in names] for folder in (original, present)]))
    shows = "pictures before and after, a row for each prompt: " + "; ".join(label for label, _ in rows)
    return _embed_plot(lambda path: save_image(path, image_grid(rows, ["original", "present state"])), shows)


def _timeline(ledger: Ledger, path: Path) -> None:
    """Bars over the numbers of the history's lines, the last of which ends where the history does."""
    last = len(ledger.entries) + 1
    states = {number: set(ledger.state(number)) for number in range(1, last)}
    rows = {concept.name: [(number, number + 1) for number, on in states.items() if concept.index in on] for concept in ledger.concepts}
    plot_timeline(rows, {change.number: change.time[:16].replace("T", " ") for change in ledger.entries} | {last: "now"}, path)


def _leakage_section(ledger: Ledger, experiment: Experiment) -> Section:
    """How far each shift that was ever on moves each prompt."""
    entries = ledger.last_shifts()
    text = "How far each shift moves what the key and value layers put out for each prompt, relatively. A concept's own shift must move " \
           "it; the others, and the protected prompts, must stay."
    if not entries:
        return Section("Leaks", "No concept was ever erased.")
    rows = leakage(text_layers(experiment.model.unet), {name: ledger.load(entry) for name, entry in entries.items()},
                 experiment.model.seen(ledger.prompts))
    matrix = pd.DataFrame(rows).pivot(index="prompt", columns="shift", values="leak").loc[ledger.prompts, list(entries)]
    matrix = matrix.rename(index={"": EMPTY_PROMPT_LABEL})
    return Section("Leaks", text, [], [_embed_plot(lambda path: plot_heatmap(matrix, "leak", path), "a heat map of leaks, a row for each prompt and a column "
                                             "for each shift")])


def _curves_section(ledger: Ledger) -> Section:
    """Loss and momentum of each erasure that learnt."""
    curves = []
    for name, entry in ledger.last_shifts().items():
        path = (ledger.root / entry["shift"]).with_suffix(".csv")
        if path.is_file() and entry["steps"]:
            curves.append(pd.read_csv(path).assign(concept=name))
    if not curves:
        return Section("Curves", "Nothing was learnt: all shifts are closed forms.")
    status_table = pd.concat(curves, ignore_index=True)
    return Section("Curves", "", [], [_embed_plot(lambda path: plot_lines(status_table, "step", {"loss": "loss", "momentum": "momentum"}, "concept", path),
                                            "loss and momentum of each erasure by step")])
