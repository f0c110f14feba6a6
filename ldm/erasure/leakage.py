"""TODO erasure.leakage."""

from __future__ import annotations

from collections.abc import Mapping
import math
import pandas as pd
import torch
from torch import nn
from ldm.erasure.shift import WeightShift, output_norms


def base_norms(layers: Mapping[str, nn.Linear], embeddings: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """The norm of what the key and value `layers` put out for each prompt's embedding (tokens, d)."""
    return output_norms((layer.weight for layer in layers.values()), embeddings)


def leakage(layers: Mapping[str, nn.Linear], shifts: Mapping[str, WeightShift], embeddings: Mapping[str, torch.Tensor],
          base: Mapping[str, float] | None = None) -> list[dict]:
    """How far each shift moves what each prompt's embedding (tokens, d) puts out: |e dW^T| / |e W^T| over the key and
    value `layers`. One row per pair: shift, prompt, leak. `base` are the `base_norms`, where they are known.
    """
    base = base or base_norms(layers, embeddings)
    rows = []
    for label, shift in shifts.items():
        moved = shift.delta_output_norms([f"{name}.weight" for name in layers], embeddings)
        rows += [{"shift": label, "prompt": prompt, "leak": moved[prompt] / base[prompt]} for prompt in embeddings]
    return rows


def leakage_after_rounding(layers: Mapping[str, nn.Linear], merged: Mapping[str, torch.Tensor],
                  embeddings: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """How far merged weights, rounded as they are, move what each prompt's embedding (tokens, d) puts out, against the base
    rounded likewise: `leaks` of all shifts together, with what rounding adds."""
    changed = {name: merged[f"{name}.weight"].cpu() for name in layers if f"{name}.weight" in merged}
    moved = output_norms((weight.double() - layers[name].weight.cpu().to(weight.dtype).double() for name, weight in changed.items()),
                  embeddings)
    base = base_norms(layers, embeddings)
    return {prompt: moved[prompt] / base[prompt] for prompt in embeddings}


def truncation_error(shift: WeightShift, cut: WeightShift, seen: torch.Tensor) -> float:
    """The share of a shift's effect on the embeddings `seen` (tokens, d) that its `cut` lacks: |e (dW - dW_cut)^T| / |e dW^T|
    over all layers."""
    seen = seen.cpu().double()
    whole = [shift.delta_output(name, seen) for name in shift.names]
    left = [moved - cut.delta_output(name, seen) for name, moved in zip(shift.names, whole)]
    return math.hypot(*(part.norm().item() for part in left)) / math.hypot(*(part.norm().item() for part in whole))


def leakage_table(layers: Mapping[str, nn.Linear], shifts: Mapping[str, WeightShift], seen: Mapping[str, torch.Tensor],
               columns: int = 9) -> pd.DataFrame:
    """`leaks` with a row for each prompt and a column for each shift. Of more shifts than `columns` it tells how far a prompt's own
    shift moves it, how far the others do at most, and which of them."""
    table = pd.DataFrame(leakage(layers, shifts, seen)).pivot(index="prompt", columns="shift", values="leak")
    table = table.loc[list(seen), list(shifts)]
    if len(shifts) <= columns:
        return table
    owners = {shift.metadata.get("prompt"): label for label, shift in shifts.items()}
    own = pd.DataFrame([[owners.get(prompt) == label for label in table] for prompt in table.index], table.index, table.columns)
    others = table.mask(own)
    return pd.DataFrame({"its own shift": table.where(own).max(axis=1), "most of the others": others.max(axis=1),
                         "which": others.idxmax(axis=1)})
