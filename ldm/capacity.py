"""How many concepts a model's prompts leave room for, at several tolerances, and what each tolerance costs in leak."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from torch import nn
from tqdm import tqdm

from ldm.attention import kv_layers
from ldm.concepts import Concept, said, watermarks
from ldm.losses import where
from ldm.model import TextToImage
from ldm.null_space import NullSpaceBasis, factor, null_space, spectrum, without_each
from ldm.shift import SeparableShift, triangle

TOLERANCES = (1e-7, 1e-4, 5e-4, 2e-3, 5e-3, 2e-2)  # to compare where nobody names others


@dataclass(frozen=True)
class Capacity:
    """`values` (d,) is the spectrum of all prompts; `table` has a row for each tolerance, `leaks` one for each tolerance and
    prompt: tolerance, prompt, held_out, leak."""

    values: torch.Tensor
    table: pd.DataFrame
    leaks: pd.DataFrame


def capacity(model: TextToImage, concepts: Sequence[Concept], templates: int, always: float, tolerances: Sequence[float],
             given: Mapping) -> Capacity:
    """What is left for further concepts when each of `concepts` is erased in closed form while the others, the blank prompt and
    the watermarks are protected, by their bare names and `templates` captions; `always` as in `ldm.erasure.solve`.

    The leak of a prompt is how far the shifts of all concepts but its own move what the layers put out for it. `given` holds
    SRS-ME's settings. In the table: `rank` of all prompts, `room`, `directions` that a concept takes, how many `more` fit,
    the least share of a concept's difference from the blank prompt that lies in its null space (`least_reach`), the largest
    leak on protected and on held-out prompts.
    """
    protected = {concept.index: said(concept, templates) for concept in concepts}
    held_out = {concept.index: [template.format(concept.prompt) for template in concept.held_out] for concept in concepts}
    erased = {concept.index: said(concept, given["templates"]) for concept in concepts}
    seen = model.seen(dict.fromkeys(["", *watermarks(),
                                     *itertools.chain(*protected.values(), *held_out.values(), *erased.values())]))
    rest = always * torch.cat([seen[prompt] for prompt in ("", *watermarks())])
    blocks = [torch.cat([seen[prompt] for prompt in prompts]) for prompts in protected.values()]
    every = factor(rest, *blocks)
    layers = kv_layers(model.unet)
    whole = triangle((layer.weight for layer in layers.values()), model.width)  # stands for all layers at once
    one = nn.Linear(model.width, len(whole), bias=False, dtype=whole.dtype, device=whole.device)
    one.weight.data = whole
    shifts: dict[tuple[float, int], torch.Tensor] = {}
    reaches: dict[tuple[float, int], float] = {}
    for concept, rows in zip(tqdm(concepts, desc="concepts", unit="concept"), without_each(blocks, rest)):
        own = torch.stack([seen[prompt] for prompt in erased[concept.index]])  # (P, tokens, d)
        for tolerance in tolerances:
            basis = NullSpaceBasis(null_space(rows, tolerance)[0], rows)
            key = tolerance, concept.index
            shifts[key], reaches[key] = torch.zeros_like(whole), 0.0
            if len(basis.vectors):
                directions, cost = where(model, concept, own, given, basis)
                far = (own - seen[""]).double().flatten(0, 1)
                reaches[key] = ((far @ directions.T).norm() / far.norm()).item()
                shifts[key] = SeparableShift.closed_form({"": one}, directions, 1.0, own, seen[""][None],
                                                         cost).delta(".weight")
    rows, leaks, unowned = [], [], {prompt: None for prompt in ("", *watermarks())}
    for tolerance in tolerances:
        total = sum(shifts[tolerance, concept.index] for concept in concepts)
        for held, prompts in ((False, protected), (True, held_out)):
            owners = ({} if held else unowned) | {prompt: index for index, own in prompts.items() for prompt in own}
            for prompt, index in owners.items():
                others = total if index is None else total - shifts[tolerance, index]
                embedding = seen[prompt].double()
                leak = ((embedding @ others.T).norm() / (embedding @ whole.T).norm()).item()
                leaks.append({"tolerance": tolerance, "prompt": prompt, "held_out": held, "leak": leak})
        taken, least = (int((spectrum(part) > tolerance).sum()) for part in (every, rest))
        each = max((taken - least) / len(concepts), 1e-9)
        row = {"tolerance": tolerance, "rank": taken, "room": model.width - taken, "directions": each,
               "more": int((model.width - taken) / each),
               "least_reach": min(reaches[tolerance, concept.index] for concept in concepts)}
        for held, name in ((False, "leak_protected"), (True, "leak_held_out")):
            row[name] = max((line["leak"] for line in leaks if line["tolerance"] == tolerance and line["held_out"] == held),
                            default=float("nan"))
        rows.append(row)
    return Capacity(spectrum(every), pd.DataFrame(rows), pd.DataFrame(leaks))
