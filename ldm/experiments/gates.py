"""Measure the gates of a list of concepts: what they miss, what they take for a concept, how firm they are, their cost.

A gate decides of a prompt by its margin: above 0 it fires. A false alarm is a prompt for which a gate fires though the
prompt does not say its concept; a miss is a prompt that says a concept whose gate does not fire.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from tqdm import tqdm

from ldm.config.concepts import Concept
from ldm.config.everyday import everyday_captions, kin_names, near_misses
from ldm.config.spellings import misspellings, says
from ldm.config.templates import fill, load_template_set
from ldm.diffusion.text_encoder import PromptEncoder
from ldm.diffusion.tokenizer import read_part
from ldm.erasure.gate_fitter import GateFitter, rate
from ldm.erasure.gated_edit import GatedEdit, GatedPrompts
from ldm.io.prompts import read_prompt_csv

HELD_OUT, TEMPLATES, MISSPELT, RESPELT = "held-out templates", "templates", "misspelt names", "other spellings"
CAPTIONS, KIN, NEAR_MISSES = "everyday captions", "kin names", "near misses"
_CAPTION_SEED = 1  # those of 0 are what a gate's own report counts
_NUM_MISSPELT = 40  # misspelt names of each concept
_NUM_ALONE = 500  # prompts, the nearest to a threshold, that are embedded one by one too
_NUM_TIMED = 200
_PROMPTS_AT_ONCE = 64
_ROUNDED_TO = {"float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class PromptSet:
    """Prompts of one kind. Where they are made for a concept, `owners` has its place in the list for each of them."""

    name: str
    prompts: Sequence[str]
    owners: Sequence[int] = ()

    @property
    def has_own_names(self) -> bool:
        """Whether the prompts are made of the names of the list."""
        return self.name in (HELD_OUT, TEMPLATES, MISSPELT, RESPELT)


@dataclass(frozen=True)
class FittedGates:
    """The edits of the concepts that have a gate, in the same order, why others have none, and the seconds of each."""

    concepts: Sequence[Concept]
    edits: Sequence[GatedEdit]
    refused: Mapping[str, str]  # by the name of a concept
    seconds: float

    @property
    def together(self) -> GatedPrompts:
        """The edits as they are applied to a prompt."""
        names = [concept.name for concept in self.concepts]
        return GatedPrompts(dict(zip(names, self.edits, strict=True)))


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


def fit_gates(fitter: GateFitter, concepts: Sequence[Concept]) -> FittedGates:
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


def read_captions(path: Path) -> PromptSet:
    """Return the prompts of a file, once each: those of a prompt list where it is a CSV file, else one a line.

    Raises ValueError for a file that is no text in UTF-8, or has no prompt.
    """
    if path.suffix.lower() == ".csv":
        prompts = [case.prompt for case in read_prompt_csv(path)]
    else:
        try:
            lines = path.read_text(encoding="utf-8-sig").splitlines()
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is no text in UTF-8: save it so, one caption a line") from error
        prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ValueError(f"{path} has no captions: give one a line, or a prompt list")
    return PromptSet(path.name, list(dict.fromkeys(prompts)))


def make_prompt_sets(concepts: Sequence[Concept], num_captions: int, tokenizer: Any) -> list[PromptSet]:
    """Return the prompts that gates are judged by: some that say no concept, and some that say each of them.

    None that is made of a name is longer than what the tokenizer reads. Misspelt names may be among those that a gate
    was fitted on; the templates that say them are not.
    """
    generic = load_template_set("generic").held_out_templates
    kin: list[str] = []
    for name in kin_names():
        kin += [name, *(fill(template, name) for template in generic)]
    made: dict[str, dict[str, int]] = {HELD_OUT: {}, TEMPLATES: {}, MISSPELT: {}, RESPELT: {}}
    for number, concept in enumerate(concepts):
        for name, prompts in _own_prompts(concept).items():
            for prompt in prompts:
                if read_part(tokenizer, prompt) is None:
                    made[name].setdefault(prompt, number)
    return [
        PromptSet(CAPTIONS, everyday_captions(num_captions, _CAPTION_SEED)),
        PromptSet(KIN, kin),
        PromptSet(NEAR_MISSES, list(near_misses())),
        *(PromptSet(name, list(found), list(found.values())) for name, found in made.items()),
    ]


def _own_prompts(concept: Concept) -> dict[str, list[str]]:
    """Return the prompts that say a concept, by the name of the set."""
    kind = load_template_set(concept.kind)
    held_out = [*kind.held_out_templates, *concept.held_out_templates]
    wrong: list[str] = []
    for spelling in concept.spellings:
        wrong += [text for text in misspellings(spelling) if not says(text, concept.spellings)]
    wrong = list(dict.fromkeys(wrong))
    random.Random(concept.name).shuffle(wrong)
    misspelt = [fill(held_out[k % len(held_out)], text) for k, text in enumerate(wrong[:_NUM_MISSPELT])]
    own: dict[str, list[str]] = {HELD_OUT: [], TEMPLATES: [], MISSPELT: misspelt, RESPELT: []}
    for spelling in concept.spellings:
        own[RESPELT] += [fill(held_out[k % len(held_out)], text) for k, text in enumerate(respellings(spelling))]
        own[HELD_OUT] += [fill(template, spelling) for template in held_out]
        own[TEMPLATES] += [fill(template, spelling) for template in (*kind.templates, *concept.templates)]
    return own


def respellings(name: str) -> list[str]:
    """Return other ways to write a name that readers still take for it: case, hyphens, letters apart, possessives."""
    words, letters = name.split(), name.replace(" ", "")
    found = [name.lower(), name.upper(), "-".join(words), "_".join(words), "".join(words).lower()]
    found += [" ".join(letters.lower()), f"{name}\u2019s", f"{'-'.join(words)}'s"]
    return [text for text in dict.fromkeys(found) if text != name]


def decide(model: PromptEncoder, gates: FittedGates, prompts: Sequence[str], at_once: int) -> Decisions:
    """Return what each gate decides of each prompt, `at_once` of which the text encoders embed in one pass."""
    layers = gates.together.layers
    found: dict[str, list[torch.Tensor]] = {name: [] for name in ("as it is", *_ROUNDED_TO)}
    for start in tqdm(range(0, len(prompts), at_once), desc="judge", unit="batch"):
        states = model.encode_with_states(list(prompts[start : start + at_once]), layers)[1]
        found["as it is"].append(_margins(gates, states))
        for name, dtype in _ROUNDED_TO.items():
            rounded = {key: state.to(dtype).float() for key, state in states.items()}
            found[name].append(_margins(gates, rounded))
    joined = {name: torch.cat(parts) for name, parts in found.items()}
    return Decisions(joined.pop("as it is"), joined)


def _margins(gates: FittedGates, states: Mapping[tuple[str, int], torch.Tensor]) -> torch.Tensor:
    """Return the margins of each prompt and gate, (N, C), on the CPU."""
    return torch.stack([edit.margins(states).cpu() for edit in gates.edits], dim=1)


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
    decisions = decide(model, gates, prompts, _PROMPTS_AT_ONCE)
    judge_seconds = time.perf_counter() - start
    judged: list[Judged] = []
    for prompt_set in prompt_sets:
        places = torch.tensor([every_prompt[prompt] for prompt in prompt_set.prompts])
        said = _find_said(prompt_set, gates.concepts, model.tokenizers[0])
        judged.append(Judged(prompt_set, decisions.margins[places], said))
    concepts = _concept_table(gates, judged)
    precision = _precision(model, gates, prompts, decisions)
    summary = {
        "gates": len(gates.edits),
        "refused": dict(gates.refused),
        "layers": {name: sorted(layers) for name, layers in gates.together.layers.items()},
        "counts": {each.prompts.name: {"false_alarms": each.false_alarms, "misses": each.misses} for each in judged},
        "least_margin": float(concepts["least_margin"].min()),
        "bytes": int(concepts["bytes"].sum()),
        "decisions": precision,
        "seconds_before_gates": setup_seconds,
        "seconds_per_gate": gates.seconds,
        "seconds_judging": judge_seconds,
        **_cost(model, gates, prompts[0]),
    }
    return GateReport(
        pd.DataFrame([each.row for each in judged]),
        pd.DataFrame([{**row, "differ": format_rate(row["differ"])} for row in precision]),
        concepts,
        _examples(gates, judged, lambda each: each.is_alarm),
        _examples(gates, [each for each in judged if each.prompts.name == HELD_OUT], lambda each: each.is_miss),
        summary,
        judged,
    )


def format_rate(found: Sequence[float]) -> str:
    """Return what `rate` found as a text: the count, its total and the interval in per cent."""
    count, total, low, high = found
    return f"{count} of {total} ({100 * low:.2f} to {100 * high:.2f} %)" if total else ""


@dataclass(frozen=True)
class Judged:
    """A set of prompts, the margins (N, C) of each gate, and which concepts each prompt says, (N, C) bool."""

    prompts: PromptSet
    margins: torch.Tensor
    said: torch.Tensor

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
        counts = {"false alarms": self.false_alarms, "misses": self.misses}
        return {"prompts": self.prompts.name, **{name: format_rate(found) for name, found in counts.items()}}


def find_names(prompts: Sequence[str], concepts: Sequence[Concept]) -> torch.Tensor:
    """Return which concepts' spellings stand in each prompt, (N, C) bool."""
    every_spelling = [spelling for concept in concepts for spelling in concept.spellings]
    found = torch.zeros(len(prompts), len(concepts), dtype=torch.bool)
    for row, prompt in zip(found, prompts, strict=True):
        if says(prompt, every_spelling):
            row |= torch.tensor([says(prompt, concept.spellings) for concept in concepts])
    return found


def _find_said(prompt_set: PromptSet, concepts: Sequence[Concept], tokenizer: Any) -> torch.Tensor:
    """Return which concepts each prompt says as far as the model reads it, or is made for, (N, C) bool.

    A near miss says none, also where it has the word: "grilled pollock fillet" is about a fish.
    """
    said = torch.zeros(len(prompt_set.prompts), len(concepts), dtype=torch.bool)
    if prompt_set.name != NEAR_MISSES:
        said = find_names([read_part(tokenizer, prompt) or prompt for prompt in prompt_set.prompts], concepts)
    for number, owner in enumerate(prompt_set.owners):
        said[number, owner] = True
    return said


def _concept_table(gates: FittedGates, judged: Sequence[Judged]) -> pd.DataFrame:
    """Return a row for each concept, the worst first; those without a gate are its first rows."""
    alarms = {name: torch.zeros(len(gates.edits), dtype=torch.int64) for name in ("false_alarms", "other_names")}
    misses: dict[str, list[tuple[int, int]]] = {}
    least = torch.full((len(gates.edits),), torch.inf)
    for each in judged:
        alarms["other_names" if each.prompts.has_own_names else "false_alarms"] += each.is_alarm.sum(0)
        missed, said = each.is_miss.sum(0).tolist(), each.said.sum(0).tolist()
        misses[each.prompts.name] = list(zip(missed, said, strict=True))
        if each.prompts.name not in (MISSPELT, RESPELT):  # of which none is sure to be a name to the model, or not
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
