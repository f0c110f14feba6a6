"""What finds a concept in prompts, kind by kind: its gate, a filter of keywords, and the gate with the text rewritten.

A miss is a prompt that means a concept and is not found; a false alarm is a near miss that is. The filter finds a
prompt that has a spelling of the concept, and the rewriting changes one that has it and trips the gate.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from ldm.config.concepts import Concept
from ldm.config.meanings import NEAR_MISSES, PATH, load_meanings
from ldm.config.prompt_kinds import name_kinds
from ldm.config.spellings import says
from ldm.diffusion.batches import encode_in_batches
from ldm.diffusion.text_model import TextModel
from ldm.diffusion.tokenizer import read_whole
from ldm.erasure.effect import anchor_change
from ldm.erasure.gate_fitter import rate
from ldm.erasure.leakage import gated_leakage
from ldm.erasure.merge import check_unedited, gated_prompts
from ldm.erasure.shift import WeightShift
from ldm.experiments.baselines import GATES, KEYWORDS, REWRITING
from ldm.experiments.gates import format_rate


@dataclass(frozen=True)
class KindOfPrompts:
    """Prompts of one kind about a concept, and whether they mean it."""

    kind: str
    concept: Concept
    prompts: Sequence[str]
    is_meant: bool


def prompts_about(concept: Concept, tokenizer: Any, path: Path = PATH) -> list[KindOfPrompts]:
    """Return the prompts of `name_kinds` and `load_meanings` of which the tokenizer reads all, by kind.

    Those that say the name have at most half as many words as it reads tokens. A kind has none where all are too long.
    `path` is the file of meanings.
    """
    max_words = max(tokenizer.model_max_length // 2, len(concept.prompt.split()))
    return [
        *_read_kinds(name_kinds(concept, max_words=max_words), concept, tokenizer),
        *meanings_about(concept, tokenizer, path),
    ]


def meanings_about(concept: Concept, tokenizer: Any, path: Path = PATH) -> list[KindOfPrompts]:
    """Return those of `prompts_about` that mean a concept without its name, or miss it nearly."""
    return _read_kinds(load_meanings(concept, path), concept, tokenizer)


def _read_kinds(found: Mapping[str, Sequence[str]], concept: Concept, tokenizer: Any) -> list[KindOfPrompts]:
    kinds: list[KindOfPrompts] = []
    for kind, prompts in found.items():
        read = read_whole(tokenizer, prompts)
        whole = [text for text in prompts if text in read]
        kinds.append(KindOfPrompts(kind.replace("_", " "), concept, whole, kind != NEAR_MISSES))
    return kinds


def detection_table(
    model: TextModel, shifts: Mapping[str, WeightShift], kinds: Sequence[KindOfPrompts]
) -> pd.DataFrame:
    """Return a row for each kind, over all its concepts: the errors of each detector, and how far prompts change.

    `shifts` are gated, by the label of their concept, and act together. Errors are misses of prompts that mean their
    concept, else false alarms, each with Wilson's interval of 95 %; `fewer errors` names gate or filter where their
    intervals are apart. `change` is the median leakage of the gates on the prompts over what the name alone would
    change by if it became the neutral word (`anchor_change`): 0 for a prompt that stays to the bit. Raises ValueError
    for a concept without a gated shift.
    """
    check_unedited(model)
    for each in kinds:
        shift = shifts.get(each.concept.label)
        if shift is None or shift.gated is None:
            raise ValueError(f"{each.concept.name} has no shift with a gate here: erase it in the `form` gated first")
    prompts = list(dict.fromkeys(text for each in kinds for text in each.prompts))
    fired, leakages = _found_by_gates(model, shifts, prompts)
    whole = {each.concept.label: anchor_change(model, each.concept) for each in kinds}
    by_kind: dict[tuple[str, bool], list[tuple[Concept, str]]] = {}
    for each in kinds:
        for text in each.prompts:
            by_kind.setdefault((each.kind, each.is_meant), []).append((each.concept, text))
    rows: list[dict[str, Any]] = []
    for (kind, is_meant), asked in by_kind.items():
        by_gate = [concept.label in fired[text] for concept, text in asked]
        by_name = [says(text, concept.spellings) for concept, text in asked]
        rewritten = [all(found) for found in zip(by_gate, by_name, strict=True)]
        decided = {GATES: by_gate, KEYWORDS: by_name, REWRITING: rewritten}
        errors = {name: found.count(not is_meant) for name, found in decided.items()}
        rows.append(_row(kind, is_meant, errors, [leakages[text] / whole[concept.label] for concept, text in asked]))
    return pd.DataFrame(rows)


def _found_by_gates(
    model: TextModel, shifts: Mapping[str, WeightShift], prompts: Sequence[str]
) -> tuple[dict[str, tuple[str, ...]], dict[str, float]]:
    """Return the labels of the gates that each prompt trips, and the leakage of all gates together on it."""
    together = gated_prompts(model, shifts)
    assert together is not None  # since every shift that is asked for has a gate
    fired: dict[str, tuple[str, ...]] = {}
    leakages: dict[str, float] = {}
    for some, embeds, states in encode_in_batches(model, prompts, together.layers, "detect"):
        fired |= dict(zip(some, together.fired(states), strict=True))
        leakages |= gated_leakage(model, together, some, embeds, states)
    return fired, leakages


def _row(kind: str, is_meant: bool, errors: Mapping[str, int], changes: Sequence[float]) -> dict[str, Any]:
    """Return a kind's row of the table, given each detector's errors and the change of each prompt."""
    rates = {name: rate(count, len(changes)) for name, count in errors.items()}
    gate, keywords = rates[GATES], rates[KEYWORDS]
    better = GATES if gate[3] < keywords[2] else KEYWORDS if keywords[3] < gate[2] else "neither"
    told = {name: format_rate(found) for name, found in rates.items()}
    errors_are = "misses" if is_meant else "false alarms"
    change = round(statistics.median(changes), 3)
    return {"prompts": kind, "errors are": errors_are, **told, "fewer errors": better, "change": change}
