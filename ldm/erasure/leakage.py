"""Leakage: the relative change of the text layers' outputs for a prompt, `|e dW^T| / |e W^T|` over all of them.

e are the rows of the prompt's embedding, W the layers' weights and dW what a shift adds to them. It is 0 for a prompt
in whose null space the shift lies, and about 1 where a concept's outputs become another prompt's.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pandas as pd
import torch
from torch import nn

from ldm.diffusion.batches import States, encode_in_batches, join_states
from ldm.diffusion.text_model import TextModel
from ldm.erasure.gated_edit import GatedEdit, GatedPrompts
from ldm.erasure.layer_rows import Streams, as_rows, row_weight
from ldm.erasure.output_norms import output_norms
from ldm.erasure.shift import WeightShift
from ldm.io.errors import notify

LARGE_LEAKAGE = 0.05  # on what should stay, of which whoever makes a shift is told


def notify_of_leakage(leakages: Mapping[str, Mapping[str, float]]) -> None:
    """Say which concepts' shifts change a protected prompt by much, given their leakage on each."""
    largest = {name: max(changes.values()) for name, changes in leakages.items()}
    large = sorted((name for name in largest if largest[name] > LARGE_LEAKAGE), key=lambda name: -largest[name])
    if large:
        worst = max(leakages[large[0]], key=lambda prompt: leakages[large[0]][prompt])
        more = f", and {len(large) - 1} more shifts change one so" if len(large) > 1 else ""
        notify(
            f"the shift of {large[0]} changes the protected prompt '{worst}' by {largest[large[0]]:.2g} (more than "
            f"{LARGE_LEAKAGE:g}){more}: take a smaller `rank_rtol`, or protect less that is like it"
        )


def base_norms(layers: Mapping[str, nn.Linear], embeds: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """Return the norm of the text `layers`' outputs for each prompt's embedding (tokens, d)."""
    return output_norms((row_weight(layers, name) for name in layers), embeds)


def leakage(
    layers: Mapping[str, nn.Linear],
    shifts: Mapping[str, WeightShift],
    embeds: Mapping[str, torch.Tensor],
    base: Mapping[str, float] | None = None,
) -> list[dict[str, Any]]:
    """Return a row for each shift and prompt: shift, prompt, leakage.

    `embeds` are the prompts' embeddings (tokens, d), `base` their `base_norms`, where these are known. The leakage of a
    shift that changes other layers too is NaN: text layers would not say all of its effect.
    """
    base = base or base_norms(layers, embeds)
    rows = []
    for label, given in shifts.items():
        shift = given.on(layers)
        if not changes_only(shift, layers):
            rows += [{"shift": label, "prompt": prompt, "leakage": math.nan} for prompt in embeds]
            continue
        changed = shift.delta_output_norms([f"{name}.weight" for name in layers], embeds)
        rows += [{"shift": label, "prompt": prompt, "leakage": changed[prompt] / base[prompt]} for prompt in embeds]
    return rows


def each_stream(
    layers: Mapping[str, nn.Linear], embeds: Mapping[str, torch.Tensor], prompts: Iterable[str]
) -> dict[str, torch.Tensor]:
    """Return embeddings (tokens, d) as each of several streams has them, by prompt and stream: zeros in the others.

    Their leakage is that of the outputs of the layers that see the stream.
    """
    found: dict[str, torch.Tensor] = {}
    if isinstance(layers, Streams) and len(layers.streams) > 1:
        for prompt in prompts:
            for name, columns in zip(layers.stream_names, layers.streams, strict=True):
                alone = torch.zeros_like(embeds[prompt])
                alone[:, columns] = embeds[prompt][:, columns]
                found[f"{prompt} ({name} alone)"] = alone
    return found


def joint_leakage(
    layers: Mapping[str, nn.Linear],
    linear: Sequence[WeightShift],
    before: Mapping[str, torch.Tensor],
    after: Mapping[str, torch.Tensor],
) -> dict[str, float]:
    """Return, for each prompt, the leakage of all shifts together: `|e' (W + dW)^T - e W^T| / |e W^T|` of all layers.

    `before` are the prompts' embeddings e (tokens, d), `after` are e', what gates make of them; dW is the sum of the
    `linear` shifts. A prompt of leakage 0 keeps every bit of its outputs. NaN where a linear shift changes other layers
    too.
    """
    linear = [shift.on(layers) for shift in linear]
    if not all(changes_only(shift, layers) for shift in linear):
        return dict.fromkeys(before, math.nan)
    matrices = (_beside_change(layers, name, linear) for name in layers)
    rows = {prompt: torch.cat([after[prompt] - embed, after[prompt]], dim=1) for prompt, embed in before.items()}
    changed = output_norms(matrices, rows) if linear else base_norms(layers, _differences(before, after))
    base = base_norms(layers, before)
    return {prompt: changed[prompt] / base[prompt] for prompt in before}


def gated_leakage(
    model: TextModel, gates: GatedPrompts, prompts: Sequence[str], embeds: torch.Tensor, states: States
) -> dict[str, float]:
    """Return the leakage of gates and their maps on prompts with embeddings (N, rows, d) and hidden `states`."""
    edited = gates(embeds, states)
    changed = (edited != embeds).flatten(1).any(1)  # few: what the rest becomes needs no product
    before, after = (model.layer_inputs(each[changed]).cpu().double() for each in (embeds, edited))
    gram, found = model.output_gram, torch.zeros(len(prompts), dtype=torch.float64)
    moved, base = (((rows @ gram) * rows).flatten(1).sum(1) for rows in (after - before, before))  # squared norms
    found[changed.cpu()] = (moved / base).sqrt()
    return dict(zip(prompts, found.tolist(), strict=True))


class EmbeddingCache:
    """The embeddings of prompts, and the norms of the text layers' outputs for them, each computed once."""

    def __init__(self, model: TextModel):
        self.model, self.layers = model, model.text_layers
        self.embeds: dict[str, torch.Tensor] = {}
        self.norms: dict[str, float] = {}
        self._read: dict[Any, tuple[torch.Tensor, States]] = {}  # by the prompts, and the states that gates read

    def get(self, prompts: Iterable[str]) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
        """Return the embeddings (tokens, d) of the prompts, and the `base_norms` of these."""
        prompts = list(dict.fromkeys(prompts))
        new = self.model.embed_prompts(prompt for prompt in prompts if prompt not in self.embeds)
        if new:
            self.embeds |= new
            self.norms |= base_norms(self.layers, new)
        return {prompt: self.embeds[prompt] for prompt in prompts}, self.norms

    def gate_leakage(self, edit: GatedEdit, prompts: Iterable[str]) -> dict[str, float]:
        """Return `gated_leakage` on prompts, which are embedded once for all gates that read the same states."""
        texts, layers = tuple(dict.fromkeys(prompts)), GatedPrompts({"": edit}).layers
        key = texts, *((name, *sorted(numbers)) for name, numbers in layers.items())
        if key not in self._read:
            batches = list(encode_in_batches(self.model, texts, layers))
            embeds = torch.cat([found.cpu() for _, found, _ in batches])
            self._read[key] = embeds, join_states([states for _, _, states in batches])
        return gated_leakage(self.model, GatedPrompts({"": edit}, self.model.places), texts, *self._read[key])


def _differences(before: Mapping[str, torch.Tensor], after: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {prompt: after[prompt] - embed for prompt, embed in before.items()}


def _beside_change(layers: Mapping[str, nn.Linear], name: str, linear: Sequence[WeightShift]) -> torch.Tensor:
    """Return W, and beside it the sum of what shifts add to it: (out, 2 d), which takes rows (e' - e, e')."""
    weight = row_weight(layers, name).cpu().double()
    changing = [shift for shift in linear if f"{name}.weight" in shift.parameter_names]
    deltas = [shift.row_delta(f"{name}.weight").cpu().double() for shift in changing]
    return torch.cat([weight, sum(deltas, torch.zeros_like(weight))], dim=1)


def leakage_by_group(leakages: Mapping[str, float], groups: Mapping[str, Sequence[str]]) -> pd.DataFrame:
    """Return a row for each group of prompts: group, prompts, unchanged_outputs, median_leakage, max_leakage.

    That is how many prompts, and the fraction of them whose leakage is 0: that trip no gate, and keep every bit of
    their outputs.
    """
    rows = []
    for group, prompts in groups.items():
        values = pd.Series([leakages[prompt] for prompt in prompts], dtype=float)
        rows.append(
            {
                "group": group,
                "prompts": len(prompts),
                "unchanged_outputs": math.nan if values.isna().any() else (values == 0).mean(),
                "median_leakage": values.median(),
                "max_leakage": values.max(),
            }
        )
    return pd.DataFrame(rows)


def embedding_leakage(layers: Mapping[str, nn.Linear], before: torch.Tensor, after: torch.Tensor) -> float:
    """Return the leakage of a change of a prompt's embedding (tokens, d): `|(e' - e) W^T| / |e W^T|` of all layers."""
    norms = base_norms(layers, {"before": before, "change": after - before})
    return norms["change"] / norms["before"]


def changes_only(shift: WeightShift, layers: Mapping[str, nn.Linear]) -> bool:
    """Return whether a shift changes the text `layers` alone, so that its leakage says all of what it does."""
    return set(shift.parameter_names) <= {f"{name}.weight" for name in layers}


def leakage_after_rounding(
    layers: Mapping[str, nn.Linear], merged: Mapping[str, torch.Tensor], embeds: Mapping[str, torch.Tensor]
) -> dict[str, float]:
    """Return the leakage of merged weights, rounded as they are, on each prompt, against the base rounded likewise.

    It is that of all shifts together, with what rounding adds; NaN where they change other layers too.
    """
    if not set(merged) <= {f"{name}.weight" for name in layers}:
        return dict.fromkeys(embeds, math.nan)
    rounded = {name: merged[f"{name}.weight"].cpu() for name in layers if f"{name}.weight" in merged}
    deltas = (
        as_rows(layers, name, weight.double() - layers[name].weight.cpu().to(weight.dtype).double())
        for name, weight in rounded.items()
    )
    changed, base = output_norms(deltas, embeds), base_norms(layers, embeds)
    return {prompt: changed[prompt] / base[prompt] for prompt in embeds}


def truncation_error(shift: WeightShift, truncated: WeightShift, embeds: torch.Tensor) -> float:
    """Return the fraction of a shift's effect on `embeds` (tokens, d) that its `truncated` form lacks.

    It is `|e (dW - dW_truncated)^T| / |e dW^T|` over all layers. Raises ValueError for a shift without any effect.
    """
    embeds = embeds.cpu().double()
    effects = [shift.delta_output(name, embeds) for name in shift.parameter_names]
    errors = [
        effect - truncated.delta_output(name, embeds)
        for name, effect in zip(shift.parameter_names, effects, strict=True)
    ]
    effect = math.hypot(*(part.norm().item() for part in effects))
    if not effect:
        raise ValueError(f"{shift.path} changes nothing of its concept's own prompts: make it again")
    return math.hypot(*(part.norm().item() for part in errors)) / effect


def leakage_table(
    layers: Mapping[str, nn.Linear],
    shifts: Mapping[str, WeightShift],
    embeds: Mapping[str, torch.Tensor],
    columns: int = 9,
) -> pd.DataFrame:
    """Return `leakage` with a row for each prompt and a column for each shift.

    Of more shifts than `columns` it tells a prompt's leakage by its own, the largest by another, and which that is.
    """
    table = pd.DataFrame(leakage(layers, shifts, embeds)).pivot(index="prompt", columns="shift", values="leakage")
    table = table.loc[list(embeds), list(shifts)]
    if len(shifts) <= columns:
        return table
    owners = {shift.metadata.get("prompt"): label for label, shift in shifts.items()}
    own = pd.DataFrame(
        [[owners.get(prompt) == label for label in table] for prompt in table.index], table.index, table.columns
    )
    others = table.mask(own)
    return pd.DataFrame(
        {
            "its own shift": table.where(own).max(axis=1),
            "max of the others": others.max(axis=1),
            "which": others.fillna(-1).idxmax(axis=1).where(others.notna().any(axis=1), ""),
        }
    )
