"""TODO erasure.capacity."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
import itertools
import pandas as pd
import torch
from torch import nn
from tqdm import tqdm
from ldm.config.concepts import Concept, said, watermark_prompts
from ldm.diffusion.model import DiffusionModel
from ldm.diffusion.text_layers import text_layers
from ldm.erasure.closed_form import erasure_directions
from ldm.erasure.null_space import NullSpaceBasis, leave_one_out_factors, null_space, qr_factor, relative_singular_values
from ldm.erasure.shift import SeparableShift, stacked_qr_factor


DEFAULT_TOLERANCES = (1e-7, 1e-4, 5e-4, 2e-3, 5e-3, 2e-2)  # to compare where nobody names others


@dataclass(frozen=True)
class CapacityReport:
    """`values` (d,) is the spectrum of all prompts; `table` has a row for each tolerance, `leaks` one for each tolerance and
    prompt: tolerance, prompt, held_out, leak."""

    values: torch.Tensor
    table: pd.DataFrame
    leaks: pd.DataFrame


def measure_capacity(model: DiffusionModel, concepts: Sequence[Concept], templates: int, always: float, tolerances: Sequence[float],
             given: Mapping) -> CapacityReport:
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
    seen = model.seen(dict.fromkeys(["", *watermark_prompts(),
                                     *itertools.chain(*protected.values(), *held_out.values(), *erased.values())]))
    rest = always * torch.cat([seen[prompt] for prompt in ("", *watermark_prompts())])
    blocks = [torch.cat([seen[prompt] for prompt in prompts]) for prompts in protected.values()]
    every = qr_factor(rest, *blocks)
    layers = text_layers(model.unet)
    whole = stacked_qr_factor((layer.weight for layer in layers.values()), model.width)  # stands for all layers at once
    one = nn.Linear(model.width, len(whole), bias=False, dtype=whole.dtype, device=whole.device)
    one.weight.data = whole
    shifts: dict[tuple[float, int], torch.Tensor] = {}
    reaches: dict[tuple[float, int], float] = {}
    for concept, rows in zip(tqdm(concepts, desc="concepts", unit="concept"), leave_one_out_factors(blocks, rest)):
        own = torch.stack([seen[prompt] for prompt in erased[concept.index]])  # (P, tokens, d)
        for tolerance in tolerances:
            basis = NullSpaceBasis(null_space(rows, tolerance)[0], rows)
            key = tolerance, concept.index
            shifts[key], reaches[key] = torch.zeros_like(whole), 0.0
            if len(basis.vectors):
                directions, cost = erasure_directions(model, concept, own, given, basis)
                far = (own - seen[""]).double().flatten(0, 1)
                reaches[key] = ((far @ directions.T).norm() / far.norm()).item()
                shifts[key] = SeparableShift.closed_form({"": one}, directions, 1.0, own, seen[""][None],
                                                         cost).delta(".weight")
    rows, leaks, unowned = [], [], {prompt: None for prompt in ("", *watermark_prompts())}
    for tolerance in tolerances:
        total = sum(shifts[tolerance, concept.index] for concept in concepts)
        for held, prompts in ((False, protected), (True, held_out)):
            owners = ({} if held else unowned) | {prompt: index for index, own in prompts.items() for prompt in own}
            for prompt, index in owners.items():
                others = total if index is None else total - shifts[tolerance, index]
                embedding = seen[prompt].double()
                leak = ((embedding @ others.T).norm() / (embedding @ whole.T).norm()).item()
                leaks.append({"tolerance": tolerance, "prompt": prompt, "held_out": held, "leak": leak})
        taken, least = (int((relative_singular_values(part) > tolerance).sum()) for part in (every, rest))
        each = max((taken - least) / len(concepts), 1e-9)
        row = {"tolerance": tolerance, "rank": taken, "room": model.width - taken, "directions": each,
               "more": int((model.width - taken) / each),
               "least_reach": min(reaches[tolerance, concept.index] for concept in concepts)}
        for held, name in ((False, "leak_protected"), (True, "leak_held_out")):
            row[name] = max((line["leak"] for line in leaks if line["tolerance"] == tolerance and line["held_out"] == held),
                            default=float("nan"))
        rows.append(row)
    return CapacityReport(relative_singular_values(every), pd.DataFrame(rows), pd.DataFrame(leaks))
