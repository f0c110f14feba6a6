"""How many concepts a model's prompts leave free directions for, at several tolerances, and at what leakage."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
import torch
from torch import nn
from tqdm import tqdm

from ldm.config.concepts import Concept, always_protected_prompts
from ldm.config.everyday import COMPOSITIONS
from ldm.config.methods import NullSpaceConfig, SRSMEConfig
from ldm.config.spellings import says
from ldm.diffusion.model import DiffusionModel
from ldm.erasure.closed_form import NoProjectionError
from ldm.erasure.initial_shift import solve_streams
from ldm.erasure.null_space import null_space_of_streams, qr_factor, relative_singular_values
from ldm.erasure.output_norms import stacked_qr_factor
from ldm.erasure.protection import ProtectedRows
from ldm.erasure.retain import RetainSet
from ldm.erasure.shift import EmbeddingShift
from ldm.erasure.targets import anchor_embeds, replaces_name, target_prompts

DEFAULT_TOLERANCES = (1e-7, 1e-4, 5e-4, 2e-3, 5e-3, 2e-2)  # to compare where nobody names others


@dataclass(frozen=True)
class CapacityReport:
    """What is left for further concepts.

    `singular_values` (d,) are those of all prompts, relative to the largest; `table` has a row for each tolerance;
    `leakage` has one for each tolerance and prompt: tolerance, prompt, held_out, leakage, group. A prompt's group is
    protected, held_out, or that of `FurtherPrompts.unprotected`.
    """

    singular_values: torch.Tensor
    table: pd.DataFrame
    leakage: pd.DataFrame


@dataclass(frozen=True)
class FurtherPrompts:
    """Prompts beside the concepts': those to protect too, and by group those that nothing protects, to report on.

    `others` are the concepts whose prompts an erasure retains, where these are not those that are erased.
    """

    protected: Sequence[str] = ()
    unprotected: Mapping[str, Sequence[str]] = field(default_factory=dict)
    others: Sequence[Concept] = ()


NO_FURTHER_PROMPTS = FurtherPrompts()


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
    further: FurtherPrompts = NO_FURTHER_PROMPTS,
) -> CapacityReport:
    """Erase each of `concepts` in closed form, all else protected, at several tolerances, and report what is left.

    What is protected are the other concepts, by their names and captions, the empty prompt, the watermarks and the
    prompts `further.protected`. The leakage of a prompt is that of the shifts of all concepts but its own. The table's
    columns: the `rank` of all prompts, the `nullity` left, the `directions` that a concept takes, how many
    `remaining_concepts` fit (None where these take no direction), the smallest fraction of a concept's difference from
    its anchor that lies in its directions (`min_projection`), and the largest leakage on protected and on held-out
    prompts.
    """
    always = list(dict.fromkeys([*always_protected_prompts(), *further.protected]))
    anchors = {concept.label: target_prompts(concept, config, model.tokenizers[0]) for concept in concepts}
    protected = {concept.label: concept.prompts(null_space_config.protected_templates) for concept in concepts}
    held_out = {concept.label: concept.held_out_prompts for concept in concepts}
    others = further.unprotected.values()
    prompts = itertools.chain(always, *protected.values(), *held_out.values(), *anchors.values(), *others)
    embeds = model.embed_prompts(dict.fromkeys(prompts))
    rows = ProtectedRows(embeds, always, protected, null_space_config.always_protected_weight)
    surrogate, retain = _surrogate_layer(model), RetainSet(model, further.others or concepts)
    results: dict[tuple[float, str], _Erased] = {}
    factors = rows.leave_one_out(concepts)
    for concept, factor in zip(tqdm(concepts, desc="concepts", unit="concept"), factors, strict=True):
        target_embeds = torch.stack([embeds[prompt] for prompt in anchors[concept.label]])  # (P, tokens, d)
        is_aligned = replaces_name(concept, config)
        aims = anchor_embeds(model, anchors[concept.label], is_aligned)  # (P, tokens, d), or (1, tokens, d)
        retain_cost = retain.cost(concept, config, len(target_embeds))
        for tolerance in tolerances:
            basis = null_space_of_streams(factor, model.streams, tolerance, null_space_config.null_space_method)[0]
            erased = _Erased(torch.zeros_like(surrogate.weight), 0.0)
            with suppress(NoProjectionError):  # nothing erases it there
                if len(basis):
                    protected_by = basis, factor
                    solved = solve_streams(config, model.streams, protected_by, target_embeds, aims, retain_cost)
                    embedding_map, directions = solved
                    assert embedding_map is not None  # since there are aims
                    difference = (target_embeds - aims).double().flatten(0, 1)
                    projection = ((difference @ directions.T).norm() / difference.norm()).item()
                    shift = EmbeddingShift(embedding_map, directions).on({"": surrogate})
                    erased = _Erased(shift.delta_weight(".weight"), projection)
            results[tolerance, concept.label] = erased
    owners: dict[tuple[str, str], str | None] = {(prompt, "protected"): None for prompt in always}
    for group, owned in (("protected", protected), ("held_out", held_out)):
        for index, own in owned.items():
            owners |= {(prompt, group): index for prompt in own}
    for group, members in further.unprotected.items():
        for prompt in members:
            owners[prompt, group] = _concept_said(prompt, concepts) if group == COMPOSITIONS else None
    leakage_rows = _leakage_rows(results, owners, embeds, surrogate.weight)
    taken, fixed = qr_factor(*rows.fixed_rows, *rows.blocks.values()), qr_factor(*rows.fixed_rows)
    taken_values = relative_singular_values(taken)
    share = torch.linalg.matrix_norm(fixed, 2) / torch.linalg.matrix_norm(taken, 2)
    fixed_values = share * relative_singular_values(fixed)  # on the same scale
    table = _summarize(results, leakage_rows, taken_values, fixed_values)
    return CapacityReport(taken_values, table, leakage_rows)


def _surrogate_layer(model: DiffusionModel) -> nn.Linear:
    """Return one layer that stands for all text layers: its outputs have the same norms."""
    layers = model.text_layers
    weights = (layers.row_weight(name) for name in layers)
    factor = stacked_qr_factor(weights, model.context_dim)
    layer = nn.Linear(model.context_dim, len(factor), bias=False, dtype=factor.dtype, device=factor.device)
    layer.weight = nn.Parameter(factor, requires_grad=False)
    return layer


def _concept_said(prompt: str, concepts: Sequence[Concept]) -> str | None:
    """Return the label of the concept that a prompt says; None for none."""
    return next((concept.label for concept in concepts if says(prompt, concept.spellings)), None)


def _leakage_rows(
    results: Mapping[tuple[float, str], _Erased],
    owners: Mapping[tuple[str, str], str | None],
    embeds: Mapping[str, torch.Tensor],
    weight: torch.Tensor,
) -> pd.DataFrame:
    """Return, for each tolerance and prompt, the leakage of the shifts of all concepts but its own."""
    rows = []
    for tolerance in dict.fromkeys(tolerance for tolerance, _ in results):
        deltas = {index: erased.delta for (of, index), erased in results.items() if of == tolerance}
        total = sum(deltas.values(), torch.zeros_like(weight))
        for (prompt, group), owner in owners.items():
            others = total if owner is None else total - deltas[owner]
            embedding = embeds[prompt].double()
            leakage = ((embedding @ others.T).norm() / (embedding @ weight.T).norm()).item()
            row = {"tolerance": tolerance, "prompt": prompt, "held_out": group == "held_out", "leakage": leakage}
            rows.append({**row, "group": group})
    return pd.DataFrame(rows)


def summarize_groups(leakage: pd.DataFrame) -> pd.DataFrame:
    """Return a row for each group of `CapacityReport.leakage`: group, prompts, median / max leakage by tolerance."""
    rows = []
    for group, members in leakage.groupby("group", sort=False):
        row: dict[str, Any] = {"group": group, "prompts": members["prompt"].nunique()}
        for tolerance, here in members.groupby("tolerance"):
            median, largest = here["leakage"].median(), here["leakage"].max()
            row[f"median / max leakage at {tolerance:g}"] = f"{median:.1e} / {largest:.1e}"
        rows.append(row)
    return pd.DataFrame(rows)


def _summarize(
    results: Mapping[tuple[float, str], _Erased],
    leakage: pd.DataFrame,
    taken_values: torch.Tensor,
    fixed_values: torch.Tensor,
) -> pd.DataFrame:
    """Return a row for each tolerance.

    `taken_values` and `fixed_values` (d,) are those of all prompts and of the always protected ones, both relative to
    the largest of the former.
    """
    width = len(taken_values)
    rows = []
    for tolerance in dict.fromkeys(tolerance for tolerance, _ in results):
        erased = [entry for (of, _), entry in results.items() if of == tolerance]
        rank, fixed_rank = (int((values > tolerance).sum()) for values in (taken_values, fixed_values))
        directions = (rank - fixed_rank) / len(erased)
        fitting = int((width - rank) / directions) if directions else None  # whose number then has no limit
        here = leakage[leakage.tolerance == tolerance]
        is_full = not any(entry.projection for entry in erased)  # so that not even these fit
        rows.append(
            {
                "tolerance": tolerance,
                "rank": rank,
                "nullity": width - rank,
                "directions": directions,
                "remaining_concepts": 0 if is_full else fitting,
                "min_projection": min(entry.projection for entry in erased),
                "max_leakage_protected": here[here.group == "protected"].leakage.max(),
                "max_leakage_held_out": here[here.group == "held_out"].leakage.max(),
            }
        )
    fitting = pd.Series([row["remaining_concepts"] for row in rows], dtype=object)  # whole numbers, or None
    return pd.DataFrame(rows).assign(remaining_concepts=fitting)
