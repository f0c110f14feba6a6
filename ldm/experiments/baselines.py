"""Two plain detectors beside the gates: a filter of keywords, and gates whose prompts are rewritten as text.

The filter fires where a prompt says one of a concept's spellings, case aside. The rewriting takes the gates' decision,
puts the neutral word in place of the name and embeds the prompt again; it needs a name that stands in the text.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import pandas as pd

from ldm.config.concepts import Concept
from ldm.config.templates import load_template_set
from ldm.diffusion.text_encoder import PromptEncoder
from ldm.experiments.gates import FittedGates, Judged, format_rate, milliseconds
from ldm.experiments.prompt_sets import (
    CAPTIONS,
    HELD_OUT,
    KIN,
    MISSPELT,
    NEAR_MISSES,
    RESPELT,
    NameIndex,
    find_names,
)

KEYWORDS, GATES, REWRITING = "keyword filter", "gate and map", "gate, text rewritten"
_FALSE_ALARMS, _MISSES = (CAPTIONS, KIN, NEAR_MISSES), (HELD_OUT, RESPELT, MISSPELT)


def rewrite(prompt: str, concept: Concept) -> str:
    """Return a prompt with the neutral word of a concept's kind in place of each of its names, the longest first."""
    names = sorted(concept.spellings, key=len, reverse=True)
    pattern = rf"(?<!\w)({'|'.join(re.escape(name) for name in names)})(?!\w)"
    return re.sub(pattern, load_template_set(concept.kind).neutral, prompt, flags=re.IGNORECASE)


def compare_detectors(model: PromptEncoder, gates: FittedGates, judged: Sequence[Judged]) -> pd.DataFrame:
    """Return a row for each detector: what it takes for a concept, what it misses, its cost, and what it has to see.

    The milliseconds are those beside embedding a prompt once, of a prompt that says a concept.
    """
    rows: dict[str, dict[str, Any]] = {name: {"detector": name} for name in (GATES, REWRITING, KEYWORDS)}
    by_name = {each.prompts.name: each for each in judged}
    for kind, names in (("false alarms", _FALSE_ALARMS), ("misses", _MISSES)):
        for name in names:
            for detector, decided in _decisions(by_name[name], gates.concepts).items():
                found = decided.false_alarms if kind == "false alarms" else decided.misses
                rows[detector][f"{kind}: {name}"] = format_rate(found)
    for detector, taken in _cost(model, gates, by_name[HELD_OUT]).items():
        rows[detector]["ms"] = round(taken, 2)
        rows[detector]["works on prompt_embeds"] = "yes" if detector == GATES else "no"
    return pd.DataFrame(list(rows.values()))


def _decisions(judged: Judged, concepts: Sequence[Concept]) -> dict[str, Judged]:
    """Return what each detector decides of a set of prompts, as margins of 1 and -1."""
    named, fired = find_names(judged.prompts.prompts, concepts), judged.margins > 0
    acts = {GATES: fired, REWRITING: fired & named, KEYWORDS: named}
    return {name: Judged(judged.prompts, 2.0 * found - 1, judged.said) for name, found in acts.items()}


def _cost(model: PromptEncoder, gates: FittedGates, judged: Judged) -> dict[str, float]:
    """Return the median milliseconds of each detector for the first prompt that trips a gate which it is made for."""
    hits: list[list[int]] = ((judged.margins > 0) & judged.said).nonzero().tolist()
    if not hits:
        return dict.fromkeys((GATES, REWRITING, KEYWORDS), float("nan"))
    number, owner = hits[0]
    prompt, together = judged.prompts.prompts[number], gates.acting_on(model)
    embeds, states = model.encode_with_states([prompt], together.layers)
    index = NameIndex(gates.concepts)

    def embed_rewritten() -> None:
        together.fired(states)
        model.encode_with_states([rewrite(prompt, gates.concepts[owner])], {})

    return {
        GATES: milliseconds(lambda: together(embeds, states)),
        REWRITING: milliseconds(embed_rewritten),
        KEYWORDS: milliseconds(lambda: index.find([prompt])),
    }
