"""How many concepts a model's prompts leave free directions for, at several tolerances, and at what leakage."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from torch import nn
from tqdm import tqdm

from ldm.config.concepts import Concept, always_protected_prompts
from ldm.config.methods import NullSpaceConfig, SRSMEConfig
from ldm.diffusion.model import DiffusionModel
from ldm.diffusion.text_layers import text_layers
from ldm.erasure.closed_form import closed_form_map
from ldm.erasure.erase import closed_form_anchor, concept_space
from ldm.erasure.null_space import null_space, qr_factor, relative_singular_values
from ldm.erasure.protection import ProtectedRows
from ldm.erasure.shift import SeparableShift, stacked_qr_factor

DEFAULT_TOLERANCES = (1e-7, 1e-4, 5e-4, 2e-3, 5e-3, 2e-2)  # to compare where nobody names others


@dataclass(frozen=True)
class CapacityReport:
    """What is left for further concepts.

    `singular_values` (d,) are those of all prompts, relative to the largest; `table` has a row for each tolerance;
    `leakage` has one for each tolerance and prompt: tolerance, prompt, held_out, leakage.
    """

    singular_values: torch.Tensor
    table: pd.DataFrame
    leakage: pd.DataFrame


@dataclass(frozen=True)
class _Erased:
    """A concept erased at one tolerance: dW of the surrogate layer, and the fraction of its difference in its space."""

    delta: torch.Tensor
    projection: float


def measure_capacity(
    model: DiffusionModel,
    concepts: Sequence[Concept],
    null_space_config: NullSpaceConfig,
    tolerances: Sequence[float],
    config: SRSMEConfig,
    extra_protected: Sequence[str] = (),
) -> CapacityReport:
    """Erase each of `concepts` in closed form, all else protected, at several tolerances, and report what is left.

    What is protected are the other concepts, by their names and captions, the empty prompt, the watermarks and the
    prompts `extra_protected`. The leakage of a prompt is that of the shifts of all concepts but its own. The table's
    columns: the `rank` of all prompts, the `nullity` left, the `directions` that a concept takes, how many
    `remaining_concepts` fit, the smallest fraction of a concept's difference from its anchor that lies in its
    directions (`min_projection`), and the largest leakage on protected and on held-out prompts.
    """
    always = list(dict.fromkeys([*always_protected_prompts(), *extra_protected]))
    anchors = {concept.index: closed_form_anchor(concept, config) for concept in concepts}
    protected = {concept.index: concept.prompts(null_space_config.protected_templates) for concept in concepts}
    held_out = {concept.index: concept.held_out_prompts for concept in concepts}
    targets = {concept.index: concept.prompts(config.target_templates) for concept in concepts}
    prompts = itertools.chain(always, *protected.values(), *held_out.values(), *targets.values(), anchors.values())
    embeds = model.embed_prompts(dict.fromkeys(prompts))
    rows = ProtectedRows(embeds, always, protected, null_space_config.always_protected_weight)
    surrogate = _surrogate_layer(model)
    results: dict[tuple[float, int], _Erased] = {}
    factors = rows.leave_one_out(concepts)
    for concept, factor in zip(tqdm(concepts, desc="concepts", unit="concept"), factors, strict=True):
        target_embeds = torch.stack([embeds[prompt] for prompt in targets[concept.index]])  # (P, tokens, d)
        for tolerance in tolerances:
            basis = null_space(factor, tolerance, null_space_config.null_space_method)[0]
            erased = _Erased(torch.zeros_like(surrogate.weight), 0.0)
            if len(basis):
                space = concept_space(model, concept, config, basis, factor, target_embeds)
                anchor_embeds = embeds[anchors[concept.index]]
                difference = (target_embeds - anchor_embeds).double().flatten(0, 1)
                projection = ((difference @ space.directions.T).norm() / difference.norm()).item()
                embedding_map = closed_form_map(space, target_embeds, anchor_embeds[None])
                shift = SeparableShift.from_map({"": surrogate}, space.directions, 1.0, embedding_map)
                erased = _Erased(shift.delta_weight(".weight"), projection)
            results[tolerance, concept.index] = erased
    owners: dict[tuple[str, bool], int | None] = {(prompt, False): None for prompt in always}
    for held, owned in ((False, protected), (True, held_out)):
        for index, own in owned.items():
            owners |= {(prompt, held): index for prompt in own}
    leakage_rows = _leakage_rows(results, owners, embeds, surrogate.weight)
    taken_values = relative_singular_values(qr_factor(torch.cat(rows.fixed_rows), *rows.blocks.values()))
    fixed_values = relative_singular_values(torch.cat(rows.fixed_rows))
    table = _summarize(results, leakage_rows, taken_values, fixed_values)
    return CapacityReport(taken_values, table, leakage_rows)


def _surrogate_layer(model: DiffusionModel) -> nn.Linear:
    """Return one layer that stands for all text layers: its outputs have the same norms."""
    weights = (layer.weight for layer in text_layers(model.unet).values())
    factor = stacked_qr_factor(weights, model.context_dim)
    layer = nn.Linear(model.context_dim, len(factor), bias=False, dtype=factor.dtype, device=factor.device)
    layer.weight = nn.Parameter(factor, requires_grad=False)
    return layer


def _leakage_rows(
    results: Mapping[tuple[float, int], _Erased],
    owners: Mapping[tuple[str, bool], int | None],
    embeds: Mapping[str, torch.Tensor],
    weight: torch.Tensor,
) -> pd.DataFrame:
    """Return, for each tolerance and prompt, the leakage of the shifts of all concepts but its own."""
    rows = []
    for tolerance in dict.fromkeys(tolerance for tolerance, _ in results):
        deltas = {index: erased.delta for (of, index), erased in results.items() if of == tolerance}
        total = sum(deltas.values(), torch.zeros_like(weight))
        for (prompt, held_out), owner in owners.items():
            others = total if owner is None else total - deltas[owner]
            embedding = embeds[prompt].double()
            leakage = ((embedding @ others.T).norm() / (embedding @ weight.T).norm()).item()
            rows.append({"tolerance": tolerance, "prompt": prompt, "held_out": held_out, "leakage": leakage})
    return pd.DataFrame(rows)


def _summarize(
    results: Mapping[tuple[float, int], _Erased],
    leakage: pd.DataFrame,
    taken_values: torch.Tensor,
    fixed_values: torch.Tensor,
) -> pd.DataFrame:
    """Return a row for each tolerance.

    `taken_values` and `fixed_values` (d,) are those of all prompts and of the always protected ones.
    """
    width = len(taken_values)
    rows = []
    for tolerance in dict.fromkeys(tolerance for tolerance, _ in results):
        erased = [entry for (of, _), entry in results.items() if of == tolerance]
        rank, fixed_rank = (int((values > tolerance).sum()) for values in (taken_values, fixed_values))
        directions = max((rank - fixed_rank) / len(erased), 1e-9)
        here = leakage[leakage.tolerance == tolerance]
        rows.append(
            {
                "tolerance": tolerance,
                "rank": rank,
                "nullity": width - rank,
                "directions": directions,
                "remaining_concepts": int((width - rank) / directions),
                "min_projection": min(entry.projection for entry in erased),
                "max_leakage_protected": here[~here.held_out].leakage.max(),
                "max_leakage_held_out": here[here.held_out].leakage.max(),
            }
        )
    return pd.DataFrame(rows)
