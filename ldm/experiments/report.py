"""One self-contained HTML page about a ledger: its timeline, images, tables, plots, and how to reproduce it."""

from __future__ import annotations

import base64
import itertools
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment

from ldm.config.concepts import EMPTY_PROMPT_LABEL, STATUSES, Concept, always_protected_prompts, erasable_concepts
from ldm.config.everyday import COMPOSITIONS
from ldm.config.methods import SRSMEConfig
from ldm.config.models import load_model_config
from ldm.diffusion.edits import edit_embeddings
from ldm.erasure.capacity import DEFAULT_TOLERANCES, FurtherPrompts, measure_capacity, summarize_groups
from ldm.erasure.gate_prompts import evenly
from ldm.erasure.leakage import joint_leakage, leakage_by_group
from ldm.erasure.merge import by_form, gated_prompts
from ldm.erasure.shift import EmbeddingShift
from ldm.experiments.experiment import Experiment
from ldm.experiments.plots import LinePlot, plot_heatmap, plot_lines, plot_spectrum, plot_timeline
from ldm.experiments.probe import UNEDITED, Bench, Subject
from ldm.experiments.robustness import ask, ask_floor, compare_findings, quick_probes, summarize
from ldm.io.image_grid import image_grid
from ldm.io.images import image_filename, open_image, save_image
from ldm.io.prompts import read_prompt_csv
from ldm.ledger.ledger import Ledger, status_table
from ldm.ledger.operations import Measure, peak_memory, verify
from ldm.metrics.compare import summarize_by
from ldm.metrics.judge import ClassifierJudge
from ldm.metrics.statuses import prompt_statuses
from ldm.metrics.tables import format_cell

_NUM_GATES = 20  # of those with the smallest gap
_NUM_CHANGED = 20  # prompts that nothing protects, of which the page says that they changed
EmbeddedImage = tuple[str, str]  # a data URI, and what it shows


@dataclass
class Section:
    """A part of the page: a heading, what it says, tables, images and commands."""

    title: str
    text: str = ""
    tables: Sequence[pd.DataFrame] = ()
    images: Sequence[EmbeddedImage] = ()
    commands: Sequence[str] = ()


@dataclass(frozen=True)
class _Results:
    """The metrics of the edited model: a row for each prompt, by status; and the folders of both models' images.

    `unprotected` are those of the prompts that nothing protects, by group; it is empty where none are asked for.
    """

    table: pd.DataFrame
    unprotected: pd.DataFrame
    original: Path
    edited: Path
    num_erased: int


def choose_shown(ledger: Ledger, most: int) -> list[Concept]:
    """Return the concepts that a page shows: all, or `most`, as many of each state, evenly chosen, and at least one."""
    active = ledger.active_shifts()
    states: dict[str, list[Concept]] = {}
    for concept in ledger.concepts:
        state = "erased" if concept.label in active else "restored" if ledger.last_shift(concept.label) else "never"
        states.setdefault(state, []).append(concept)
    chosen: list[Concept] = []
    for number, members in enumerate(sorted(states.values(), key=len)):  # so that what few leave is for the others
        chosen += evenly(members, max(1, (most - len(chosen)) // (len(states) - number)))
    return [concept for concept in ledger.concepts if concept in chosen]


def render_report(
    ledger: Ledger,
    experiment: Experiment,
    num_shown: int,
    commands: Sequence[str],
    concepts: Sequence[Concept] = (),
    num_probed: int = 0,
) -> str:
    """Return the page as HTML.

    `experiment` generates the images of the original and of the edited model, on the same seeds; `num_shown` of each
    prompt are shown. `commands` are what makes the same ledger again. Images, timeline and leakage are of `concepts`,
    by default all of the ledger's; its state, its gates and the leakage by group are of all. The probes of robustness
    that train nothing are asked of `num_probed` erased concepts that the classifier knows.

    Raises ValueError for a ledger that `verify` does not accept.
    """
    start, model = time.perf_counter(), experiment.model
    shown = concepts or ledger.concepts
    checks = verify(ledger, model)
    worth = [_worth_section(ledger, experiment, num_probed)] if num_probed else []
    results = _evaluate(ledger, experiment)
    images = _before_and_after(results, num_shown)
    named = {"prompt": {"": EMPTY_PROMPT_LABEL}}
    summary_by_status = summarize_by(pd.concat([results.table, results.unprotected]), "status")
    num_erased, base_model = results.num_erased, ledger.header["base_model"]
    summary = f"{num_erased} of {len(ledger.concepts)} concepts are erased."
    if len(shown) < len(ledger.concepts):
        summary += f" Images, their results, timeline and the heat map of leakage are of {len(shown)} of them."
    sections = [
        Section("What is erased", f"{base_model}, digest {model.digest[:12]}. {summary}", [status_table(ledger)]),
        _timeline_section(ledger, shown),
        Section(
            "Before and after",
            "The original on the left, the edited model on the right, from the same seeds.",
            images=[images],
        ),
        Section(
            "Results",
            "Accuracies in per cent by the classifier, distances between the two images of a seed. Unchanged is the "
            "fraction of images that differ from the original's by at most 1 of 255 in every pixel. Prompts that "
            "nothing protects are summarized by group; those that changed most come last.",
            [summary_by_status, results.table.replace(named), *_most_changed(results.unprotected)],
        ),
        _watermark_section(results.table),
        _leakage_section(ledger, experiment, shown),
        _gates_section(ledger),
        _curves_section(ledger),
        _capacity_section(ledger, experiment),
        *worth,
        _cost_section(ledger, start),
        Section("Reproduce", "Every digest was recomputed for this page.", [checks], commands=commands),
    ]
    template = Environment(autoescape=True).from_string((Path(__file__).parent / "report.html").read_text())
    return template.render(title=f"{base_model}: {num_erased} concepts erased", sections=sections, cell=format_cell)


def _worth_section(ledger: Ledger, experiment: Experiment, num_probed: int) -> Section:
    """Return what probes find of the ledger's model. Raises ValueError without a classifier that knows its concepts."""
    active = ledger.active_shifts()
    classifier = experiment.classifier
    judge = ClassifierJudge(classifier) if classifier else None
    told = [concept for concept in ledger.concepts if judge is not None and judge.knows(concept)]
    erased = [concept for concept in told if concept.label in active][:num_probed]
    restored = [each for each in told if ledger.last_shift(each.label) and each.label not in active][:num_probed]
    if judge is None or not erased:
        raise ValueError("probes need a classifier that knows an erased concept: give `classifier` one, or no probes")
    folder = experiment.folder / "robustness"
    bench = Bench(
        experiment.model,
        experiment.category,
        folder,
        judge,
        experiment.sampling,
        erased,
        restored,
        seed=experiment.seed,
    )
    probes = quick_probes()
    subject = Subject("this ledger", ledger.shifts(), experiment.form)
    tables = [*ask_floor(bench, probes), *ask(bench, UNEDITED, probes), *ask(bench, subject, probes)]
    text = (
        f"Of {', '.join(concept.name for concept in erased)}: how often the concept shows by each probe, beside the "
        "unedited model and a floor, what the same finds where the concept is not asked for. Shares have Wilson's "
        "interval of 95 %."
    )
    return Section(
        "What the erasure is worth", text, [summarize(compare_findings(pd.concat(tables, ignore_index=True)))]
    )


def _evaluate(ledger: Ledger, experiment: Experiment) -> _Results:
    active = ledger.active_shifts()
    ever_erased = [concept for concept in ledger.concepts if ledger.last_shift(concept.label)]
    erased = [concept for concept in ever_erased if concept.label in active]
    restored = [concept for concept in ever_erased if concept.label not in active]
    table, edited = experiment.evaluate(ledger.shifts(), "now")
    original = experiment.generate({}, "")
    indexes = _indexes(erased)
    statuses = prompt_statuses(edited, experiment.category, table["prompt"], erased, restored)
    table.insert(0, "status", [statuses[prompt] for prompt in table["prompt"]])
    table = table.sort_values("status", key=lambda column: column.map(STATUSES.index), kind="stable")
    unprotected = experiment.evaluate_unprotected(ledger.shifts(), "now", indexes)
    return _Results(table, unprotected, original, edited, len(erased))


def _indexes(concepts: Sequence[Concept]) -> list[int]:
    """Return the indexes of concepts in their category, but for those that their owner named by their texts."""
    return [concept.index for concept in concepts if not concept.is_own]


def _most_changed(table: pd.DataFrame) -> list[pd.DataFrame]:
    """Return the rows of the prompts whose images changed most and should not have; nothing where none changed."""
    if table.empty:
        return []
    changed = table[(table["unchanged"] < 1) & (table["status"] != f"erased {COMPOSITIONS}")]
    changed = changed.sort_values("lpips", ascending=False)
    return [changed[["status", "prompt", "lpips", "max_abs_diff"]].head(_NUM_CHANGED)] if len(changed) else []


def _embed_plot(draw: Callable[[Path], None], description: str) -> EmbeddedImage:
    """Return the PNG that `draw` writes to a path, embedded."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "plot.png"
        draw(path)
        return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}", description


def _before_and_after(results: _Results, num_shown: int) -> EmbeddedImage:
    cases = read_prompt_csv(results.edited / "prompts.csv")
    rows = []
    for prompt, status in zip(results.table["prompt"], results.table["status"]):
        filenames = [image_filename(case.case_number, 0) for case in cases if case.prompt == prompt][:num_shown]
        before = [open_image(results.original / filename) for filename in filenames]
        after = [open_image(results.edited / filename) for filename in filenames]
        rows.append((f"{prompt or EMPTY_PROMPT_LABEL} ({status})", [before, after]))
    description = "images before and after, a row for each prompt: " + "; ".join(label for label, _ in rows)
    grid = image_grid(rows, ["original", "edited"])
    return _embed_plot(lambda path: save_image(path, grid), description)


def _timeline_section(ledger: Ledger, concepts: Sequence[Concept]) -> Section:
    history = pd.DataFrame({"history": ledger.history_lines()})
    if not ledger.entries:
        return Section("Timeline", "", [history])
    plot = _embed_plot(
        lambda path: _plot_history(ledger, concepts, path), "bars over time: when each concept was erased"
    )
    return Section("Timeline", "", [history], [plot])


def _plot_history(ledger: Ledger, concepts: Sequence[Concept], path: Path) -> None:
    """Plot bars over the numbers of the ledger's entries; the last of these ends where the history does."""
    end = len(ledger.entries) + 1
    erased_after = {number: set(ledger.active_shifts(number)) for number in range(1, end)}
    rows = {}
    for concept in concepts:
        numbers = [number for number, erased in erased_after.items() if concept.label in erased]
        rows[concept.name] = [(number, number + 1) for number in numbers]
    ticks: dict[float, str] = {entry.index: entry.time[:16].replace("T", " ") for entry in ledger.entries}
    ticks[end] = "now"
    plot_timeline(rows, ticks, path)


def _watermark_section(table: pd.DataFrame) -> Section:
    rows = table[table["prompt"].isin(always_protected_prompts())]
    num_images, max_abs_diff = int(rows["images"].sum()), int(rows["max_abs_diff"].max())
    text = f"They must not change: no pixel of {num_images} images is off by more than {max_abs_diff} of 255."
    columns = ["prompt", "images", "lpips", "unchanged", "psnr", "max_abs_diff"]
    named = rows[columns].replace({"prompt": {"": EMPTY_PROMPT_LABEL}})
    return Section("Watermarks and the empty prompt", text, [named])


def _leakage_section(ledger: Ledger, experiment: Experiment, concepts: Sequence[Concept]) -> Section:
    """Return the leakage of the last shift of each of `concepts` that was ever erased, and of all by group."""
    names = {concept.name for concept in concepts}
    records = {name: record for name, record in ledger.last_shifts().items() if name in names}
    if not records:
        return Section("Leakage", "No concept was ever erased.")
    text = (
        "Leakage is the relative change of the key and value layers' output for a prompt. A concept's own shift must "
        "change its prompt's; the other concepts' prompts, and the protected ones, must keep theirs. That of a gate "
        "alone is what its gate does, of any other shift what its change of weights does. It is left empty "
        "for a shift that changes other layers too, whose effect it would not say. The table is about what is erased "
        "now, all together, in the form in which it acts: unchanged_outputs is the fraction of prompts that trip no "
        "gate, whose outputs keep every bit. A change of weights lets none keep them: see how small its leakage is."
    )
    prompts = [*ledger.header["protected"], *(concept.prompt for concept in concepts)]
    measure = Measure(experiment.model, prompts)
    changes = {name: measure.changes(ledger.load(record)) for name, record in records.items()}
    table = pd.DataFrame(changes, index=pd.Index(prompts), dtype=float).rename(index={"": EMPTY_PROMPT_LABEL})
    description = "a heat map of leakage, a row for each prompt and a column for each shift"
    image = _embed_plot(lambda path: plot_heatmap(table, "leakage", path), description)
    return Section("Leakage", text, [_leakage_by_group(ledger, experiment)], [image])


def _leakage_by_group(ledger: Ledger, experiment: Experiment) -> pd.DataFrame:
    """Return the leakage of all active shifts together on each group of prompts, in the form of the experiment."""
    model, shifts = experiment.model, ledger.shifts()
    erased = [concept for concept in ledger.concepts if concept.label in shifts]
    kept = [concept.prompt for concept in ledger.concepts if concept.label not in shifts]
    named = [concept.prompt for concept in erased]
    concepts = {"erased": named, "not erased": kept, "protected": ledger.header["protected"]}
    groups = {group: prompts for group, prompts in concepts.items() if prompts}
    groups |= experiment.unprotected_groups(_indexes(erased))
    prompts = list(dict.fromkeys(itertools.chain(*groups.values())))
    before = model.embed_prompts(prompts)
    gated, linear = by_form(shifts, experiment.form)
    with edit_embeddings(model, gated_prompts(model, gated)):
        after = model.embed_prompts(prompts)
    return leakage_by_group(joint_leakage(model.text_layers, list(linear.values()), before, after), groups)


def _gates_section(ledger: Ledger) -> Section:
    """Return what is known of the gates of what is erased, those with the smallest gap first."""
    reports: dict[str, Mapping[str, Any]] = {}
    for shift in ledger.shifts().values():
        if shift.gated:
            reports[shift.metadata["concept"]] = shift.gated.report
    if not reports:
        return Section("Gates", "Nothing that is erased has a gate.")
    columns = ("gap", "false_alarms", "misses", "misspelt_misses", "distance_left")
    rows = [{"concept": name, **{column: report.get(column) for column in columns}} for name, report in reports.items()]
    table = pd.DataFrame(rows).sort_values("gap", kind="stable")
    for column in columns[1:4]:
        table[column] = [f"{found[0]} of {found[1]}" if found else "" for found in table[column]]
    number = "1 gate" if len(reports) == 1 else f"{len(reports)} gates"
    text = (
        f"{number}, as measured when made. The gap is that between the highest prompt that does not say a concept and "
        "the lowest that does, in units of the concept's distance from all others; false alarms are counted on "
        "everyday captions, misses on held-out prompts. Those with the smallest gap are here."
    )
    return Section("Gates", text, [table.head(_NUM_GATES)])


def _curves_section(ledger: Ledger) -> Section:
    """Return loss and momentum of each erasure that was trained."""
    curves = []
    for name, record in ledger.last_shifts().items():
        path = (ledger.root / record["shift"]).with_suffix(".csv")
        if path.is_file() and record["iterations"]:
            curve = pd.read_csv(path).rename(columns={"step": "iteration"})  # as version 0.1 called it
            curves.append(curve.assign(concept=name))
    if not curves:
        return Section("Curves", "Nothing was trained: all shifts are closed forms.")
    table = pd.concat(curves, ignore_index=True)
    plot = LinePlot("iteration", "concept", {"loss": "loss", "momentum": "momentum"})
    description = "loss and momentum of each erasure by iteration"
    return Section("Curves", images=[_embed_plot(lambda path: plot_lines(table, plot, path), description)])


def _capacity_section(ledger: Ledger, experiment: Experiment) -> Section:
    model, shifts = experiment.model, ledger.shifts()
    if shifts and all(isinstance(shift, EmbeddingShift) and shift.is_gate_alone for shift in shifts.values()):
        return Section(
            "Capacity", "What is erased here takes no directions of the embedding: its gates change no weights."
        )
    config = load_model_config(model)
    method = config.methods[SRSMEConfig.name]
    assert isinstance(method, SRSMEConfig)
    others = erasable_concepts(ledger.category) or ledger.concepts
    further = FurtherPrompts(ledger.header["protected"], experiment.unprotected_groups(()), others)
    capacity = measure_capacity(model, ledger.concepts, config.null_space, DEFAULT_TOLERANCES, method, further)
    text = (
        "What the prompts of all concepts leave free at several tolerances, and what each tolerance costs, where "
        "shifts act on the weights. By group: the median and the largest leakage of all shifts but a prompt's own."
    )
    singular_values = capacity.singular_values.tolist()
    plot = _embed_plot(
        lambda path: plot_spectrum(singular_values, capacity.table, path),
        "the spectrum of the protected prompts, and leakage by tolerance",
    )
    return Section("Capacity", text, [capacity.table, summarize_groups(capacity.leakage)], [plot])


def _cost_section(ledger: Ledger, start: float) -> Section:
    """Return what each erasure cost, and what this page did since `start`."""
    rows = []
    for entry in ledger.entries:
        for record in entry.erase.values():
            seconds, peak_gib = record.get("seconds", ""), record.get("peak_gib", "")
            rows.append({"erased": record["concept"], "at": entry.time, "seconds": seconds, "peak GiB": peak_gib})
    text = (
        f"Erasures with all that was erased by the same command. This page took {time.perf_counter() - start:.0f} s "
        f"and at most {peak_memory() / 2**30:.2f} GiB."
    )
    return Section("Time and memory", text, [pd.DataFrame(rows)])
