"""What an erasure took, and what was measured of its shift, as a row of a table."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field

import pandas as pd

from ldm.diffusion.text_model import TextModel

# What is measured of a shift on its own and on protected prompts: the relative change of the text layers' outputs, or
# without a denoiser of the embeddings themselves.
OF_OUTPUTS = ("target_change", "max_leakage_protected")
OF_EMBEDDINGS = ("embedding_change", "max_embedding_change_protected")


@dataclass(frozen=True)
class ErasureSummary:
    """What an erasure took, its effect, and the leakage of its shift on its own prompt and on what is protected.

    The effect is `effect.Effect.mean`, of its gate where it has one. Of a gate it is the gap that its threshold lies
    in, and how many everyday captions trip it.
    """

    concept: str
    iterations: int
    seconds: float
    momentum: float
    effect: float
    target_change: float
    max_leakage_protected: float
    gate_gap: float = math.nan
    gate_false_alarms: str = ""
    leakage: Mapping[str, float] = field(default_factory=dict, repr=False)  # on each protected prompt


def summary_table(summaries: Sequence[ErasureSummary], model: TextModel) -> pd.DataFrame:
    """Return a row for each erasure by a model, without the columns that say nothing of any."""
    table = pd.DataFrame([asdict(summary) for summary in summaries]).drop(columns="leakage", errors="ignore")
    if not model.digests:
        table = table.rename(columns=dict(zip(OF_OUTPUTS, OF_EMBEDDINGS, strict=True)))
    return table.replace("", math.nan).dropna(axis="columns", how="all").fillna("")
