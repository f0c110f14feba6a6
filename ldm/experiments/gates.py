"""Measure the gates of a list of concepts: what they miss, what they take for a concept, how firm they are, their cost.

A gate decides of a prompt by its margin: above 0 it fires. A false alarm is a prompt for which a gate fires though the
prompt does not say its concept; a miss is a prompt that says a concept whose gate does not fire.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
import torch
from tqdm import tqdm

from ldm.config.concepts import Concept
from ldm.diffusion.batches import PROMPTS_AT_ONCE, encode_in_batches
from ldm.diffusion.text_encoder import PromptEncoder
from ldm.erasure.gate_fitter import rate
from ldm.erasure.gate_fitters import AnyGateFitter
from ldm.erasure.gated_edit import GatedEdit, GatedPrompts
from ldm.experiments.prompt_sets import HELD_OUT, MISSPELT, RESPELT, RESTORED, PromptSet, find_said
from ldm.io.errors import notify
from ldm.ledger.ledger import Ledger
from ldm.ledger.lines import some_of

_NUM_ALONE = 500  # prompts, the nearest to a threshold, that are embedded one by one too
_NUM_TIMED = 200
_UNSURE = (MISSPELT, RESPELT)  # of which no prompt is sure to be a name to the model, or not
_ROUNDED_TO = {"float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class FittedGates:
    """The edits of the concepts that have a gate, in the same order, and why others have none.

    `seconds` is what each took to make; None for those that were there.
    """

    concepts: Sequence[Concept]
    edits: Sequence[GatedEdit]
    refused: Mapping[str, str]  # by the name of a concept
    seconds: float | None

    @property
    def together(self) -> GatedPrompts:
        """The edits as they decide of a prompt."""
        names = [concept.name for concept in self.concepts]
        return GatedPrompts(dict(zip(names, self.edits, strict=True)))

    def acting_on(self, model: PromptEncoder) -> GatedPrompts:
        """Return the edits as they change what a model makes of prompts."""
        return GatedPrompts(self.together.edits, model.places)


@dataclass(frozen=True)
class Decisions:
    """The margins (N, C) of prompts and gates, and those with the states rounded to other dtypes, by name."""

    margins: torch.Tensor
    rounded: Mapping[str, torch.Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class GateReport:
    """Tables of counts, of decisions in other numbers and of concepts; examples of errors; and all as one summary."""

    counts: pd.DataFrame
    precision: pd.DataFrame
    concepts: pd.DataFrame
    false_alarms: pd.DataFrame
    misses: pd.DataFrame
    summary: Mapping[str, Any]
    judged: Sequence[Judged]


def fit_gates(fitter: AnyGateFitter, concepts: Sequence[Concept]) -> FittedGates:
    """Return a gate for each concept that has one. Raises ValueError when none has."""
    fitted: list[Concept] = []
    edits: list[GatedEdit] = []
    refused: dict[str, str] = {}
    start = time.perf_counter()
    results = tqdm(fitter.fit_all(concepts), desc="gates", unit="gate", total=len(concepts))
    for concept, found in zip(concepts, results, strict=True):
        if isinstance(found, ValueError):
            refused[concept.name] = str(found)
        else:
            fitted.append(concept)
            edits.append(found)
    seconds = (time.perf_counter() - start) / len(concepts)
    if not edits:
        raise ValueError(f"none of the {len(concepts)} concepts has a gate: {next(iter(refused.values()))}")
    return FittedGates(fitted, edits, refused, seconds)


def active_gates(ledger: Ledger) -> FittedGates:
    """Return the gates of what a ledger has erased; shifts without one are left out, with a notice.

    Raises ValueError where nothing is erased, or all of it without a gate.
    """
    concepts: list[Concept] = []
    edits: list[GatedEdit] = []
    linear: list[str] = []
    shifts = ledger.shifts()
    for concept in ledger.concepts:
        if concept.label not in shifts:
            continue
        edit = shifts[concept.label].gated
        if edit is None:
            linear.append(concept.name)
            continue
        concepts.append(concept)
        edits.append(edit)
    if not edits:
        how = " by a gate: restore one of its concepts, and erase it with one" if linear else ": erase a concept first"
        raise ValueError(f"nothing is erased in {ledger.root}{how}")
    if linear:
        notify(f"{some_of(linear)}: erased without a gate, and left out here")
    return FittedGates(concepts, edits, {}, None)


def decide(
    model: PromptEncoder, gates: FittedGates, prompts: Sequence[str], at_once: int = PROMPTS_AT_ONCE
) -> Decisions:
    """Return what each gate decides of each prompt, `at_once` of which the text encoders embed in one pass."""
    together = gates.together
    found: dict[str, list[torch.Tensor]] = {name: [] for name in ("as it is", *_ROUNDED_TO)}
    for _, _, states in encode_in_batches(model, prompts, together.layers, "judge", at_once):
        found["as it is"].append(together.margins(states))
        for name, dtype in _ROUNDED_TO.items():
            rounded = {key: state.to(dtype).float() for key, state in states.items()}
            found[name].append(together.margins(rounded))
    joined = {name: torch.cat(parts) for name, parts in found.items()}
    return Decisions(joined.pop("as it is"), joined)


def find_kept(model: PromptEncoder, gates: FittedGates, prompts: Sequence[str]) -> torch.Tensor:
    """Return which prompts keep every bit of their embedding while the gates act, (N,) bool."""
    together, found = gates.acting_on(model), [torch.ones(0, dtype=torch.bool)]
    for _, before, states in encode_in_batches(model, prompts, together.layers):
        after = together(before, states)
        same = before.view(torch.uint8) == after.view(torch.uint8)  # bytes: 0 and -0 are equal as numbers
        found.append(same.flatten(1).all(1).cpu())
    return torch.cat(found)


def evaluate_gates(
    model: PromptEncoder, gates: FittedGates, prompt_sets: Sequence[PromptSet], setup_seconds: float
) -> GateReport:
    """Return how well gates tell prompts that say their concept from others; `setup_seconds` is reported too."""
    every_prompt: dict[str, int] = {}
    for prompt_set in prompt_sets:
        for prompt in prompt_set.prompts:
            every_prompt.setdefault(prompt, len(every_prompt))
    prompts = list(every_prompt)
    start = time.perf_counter()
    decisions = decide(model, gates, prompts)
    judge_seconds = time.perf_counter() - start
    judged: list[Judged] = []
    for prompt_set in prompt_sets:
        places = torch.tensor([every_prompt[prompt] for prompt in prompt_set.prompts], dtype=torch.long)
        said = find_said(prompt_set, gates.concepts, model.tokenizers[0])
        kept = find_kept(model, gates, prompt_set.prompts) if prompt_set.name == RESTORED else None
        judged.append(Judged(prompt_set, decisions.margins[places], said, kept))
    concepts = _concept_table(gates, judged)
    precision = _precision(model, gates, prompts, decisions)
    summary = {
        "gates": len(gates.edits),
        "refused": dict(gates.refused),
        "layers": {name: sorted(layers) for name, layers in gates.together.layers.items()},
        "counts": {each.prompts.name: each.counts for each in judged},
        "least_margin": float(concepts["least_margin"].min()),
        "bytes": int(concepts["bytes"].sum()),
        "decisions": precision,
        "seconds_before_gates": setup_seconds,
        "seconds_per_gate": gates.seconds,
        "seconds_judging": judge_seconds,
        **_cost(model, gates, prompts[0]),
    }
    return GateReport(
        pd.DataFrame([each.row for each in judged]).fillna(""),
        pd.DataFrame([{**row, "differ": format_rate(row["differ"])} for row in precision]),
        concepts,
        _examples(gates, judged, lambda each: each.is_alarm),
        _examples(gates, [each for each in judged if each.prompts.name not in _UNSURE], lambda each: each.is_miss),
        summary,
        judged,
    )


def format_rate(found: Sequence[float]) -> str:
    """Return what `rate` found as a text: the count, its total and the interval in per cent."""
    count, total, low, high = found
    return f"{count} of {total} ({100 * low:.2f} to {100 * high:.2f} %)" if total else ""


@dataclass(frozen=True)
class Judged:
    """A set of prompts, the margins (N, C) of each gate, and which concepts each prompt says, (N, C) bool.

    Of restored concepts' prompts it is known too which of them are `kept` to the bit, (N,).
    """

    prompts: PromptSet
    margins: torch.Tensor
    said: torch.Tensor
    kept: torch.Tensor | None = None

    @property
    def is_alarm(self) -> torch.Tensor:
        """Which gates fire for a concept that the prompt does not say, (N, C)."""
        return (self.margins > 0) & ~self.said

    @property
    def is_miss(self) -> torch.Tensor:
        """Which gates do not fire for a concept that the prompt says, (N, C)."""
        return (self.margins <= 0) & self.said

    @property
    def false_alarms(self) -> list[float]:
        """The rate of prompts for which any gate fires whose concept they do not say."""
        return rate(int(self.is_alarm.any(1).sum()), len(self.said))

    @property
    def misses(self) -> list[float]:
        """The rate of misses among the pairs of a prompt and a concept that it says."""
        return rate(int(self.is_miss.sum()), int(self.said.sum()))

    @property
    def row(self) -> dict[str, Any]:
        """The set's row of the table of counts."""
        counts = {name.replace("_", " "): format_rate(found) for name, found in self.counts.items()}
        return {"prompts": self.prompts.name, **counts}

    @property
    def counts(self) -> dict[str, list[float]]:
        """The rates of what gates do to the set's prompts, by name."""
        counts = {"false_alarms": self.false_alarms, "misses": self.misses}
        return counts if self.kept is None else {**counts, "kept": rate(int(self.kept.sum()), len(self.kept))}


def _concept_table(gates: FittedGates, judged: Sequence[Judged]) -> pd.DataFrame:
    """Return a row for each concept, the worst first; those without a gate are its first rows."""
    alarms = {name: torch.zeros(len(gates.edits), dtype=torch.int64) for name in ("false_alarms", "other_names")}
    misses: dict[str, list[tuple[int, int]]] = {}
    least = torch.full((len(gates.edits),), torch.inf)
    for each in judged:
        alarms["other_names" if each.prompts.has_own_names else "false_alarms"] += each.is_alarm.sum(0)
        missed, said = each.is_miss.sum(0).tolist(), each.said.sum(0).tolist()
        misses[each.prompts.name] = list(zip(missed, said, strict=True))
        if each.prompts.name not in _UNSURE:
            least = torch.minimum(least, each.margins.abs().amin(0))
    rows: list[dict[str, Any]] = []
    for number, (concept, edit) in enumerate(zip(gates.concepts, gates.edits, strict=True)):
        held_out, misspelt = misses[HELD_OUT][number], misses[MISSPELT][number]
        rows.append(
            {
                "concept": concept.name,
                "gap": min(gate.gap for gate in edit.gates.values()),
                "misses": held_out[0],
                "held_out": held_out[1],
                "false_alarms": int(alarms["false_alarms"][number]),
                "other_names": int(alarms["other_names"][number]),
                "misspelt_misses": misspelt[0],
                "misspelt": misspelt[1],
                "least_margin": float(least[number]),
                "bytes": sum(part.nbytes for name, part in edit.tensors().items() if name.startswith("gate.")),
            }
        )
    table = pd.DataFrame(rows)
    errors = table["misses"] + table["false_alarms"] + table["other_names"]
    worst = table.assign(errors=errors).sort_values(["errors", "gap"], ascending=[False, True]).drop(columns="errors")
    refused = pd.DataFrame({"concept": list(gates.refused)}, dtype=object)
    return pd.concat([refused, worst.astype(object)], ignore_index=True)  # as objects, of which counts stay whole


def _examples(gates: FittedGates, judged: Sequence[Judged], find: Callable[[Judged], torch.Tensor]) -> pd.DataFrame:
    """Return the prompts and gates that `find` marks: first those not made of the list's names, the clearest first."""
    rows: list[dict[str, Any]] = []
    for each in judged:
        for number, gate in find(each).nonzero().tolist():
            rows.append(
                {
                    "prompts": each.prompts.name,
                    "prompt": each.prompts.prompts[number],
                    "concept": gates.concepts[gate].name,
                    "margin": float(each.margins[number, gate]),
                    "own": each.prompts.has_own_names,
                }
            )
    rows.sort(key=lambda row: (row["own"], -abs(row["margin"])))
    return pd.DataFrame(rows, columns=["prompts", "prompt", "concept", "margin"])


def _precision(
    model: PromptEncoder, gates: FittedGates, prompts: Sequence[str], decisions: Decisions
) -> list[dict[str, Any]]:
    """Return how many decisions are others with rounded states, and for prompts that are embedded one by one."""
    compared = {name: (decisions.margins, margins) for name, margins in decisions.rounded.items()}
    nearest: list[int] = decisions.margins.abs().amin(1).argsort()[:_NUM_ALONE].tolist()
    alone = decide(model, gates, [prompts[number] for number in nearest], at_once=1).margins
    compared[f"one prompt at a time, the nearest {len(alone)}"] = (decisions.margins[nearest], alone)
    rows: list[dict[str, Any]] = []
    for name, (before, after) in compared.items():
        differ = int(((before > 0) != (after > 0)).sum())
        rows.append(
            {
                "numbers": name,
                "differ": rate(differ, before.numel()),
                "least_margin": float(after.abs().min()),
                "largest_change": float((after - before).abs().max()),
            }
        )
    return rows


def _cost(model: PromptEncoder, gates: FittedGates, prompt: str) -> dict[str, float]:
    """Return the median milliseconds to embed one prompt, and to ask all gates about it."""
    together = gates.together
    states = model.encode_with_states([prompt], together.layers)[1]
    return {
        "milliseconds_to_embed": milliseconds(lambda: model.encode_with_states([prompt], together.layers)),
        "milliseconds_of_gates": milliseconds(lambda: together.fired(states)),
    }


def milliseconds(call: Callable[[], object]) -> float:
    """Return the median milliseconds that a call takes."""
    taken: list[float] = []
    for _ in range(_NUM_TIMED):
        start = time.perf_counter()
        call()
        taken.append(1000 * (time.perf_counter() - start))
    return statistics.median(taken)
