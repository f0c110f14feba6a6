"""The methods by name: the loss of each that trains, and the closed form of others. `METHODS` has their settings."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ldm.config.methods import MethodConfig, SRSMEConfig, complete_gate_settings, complete_settings
from ldm.diffusion.model import DiffusionModel
from ldm.diffusion.text_model import TextModel
from ldm.erasure.key_values import check_key_values
from ldm.erasure.losses import (
    AblatingConceptsLoss,
    ESDLoss,
    ForgetMeNotLoss,
    FullCorrelationLoss,
    SRSMELoss,
)
from ldm.erasure.shift import DenseShift
from ldm.erasure.speed import solve_speed
from ldm.erasure.uce import solve_uce
from ldm.io.legacy import ADDED_KEYS

# The joint variant's parts are SRS-ME's losses, which JointSRSMELoss balances.
LOSSES: dict[str, Any] = {
    "SRS-ME": SRSMELoss,
    "SRS-ME-dagger": SRSMELoss,
    "SRS-ME-double-dagger": FullCorrelationLoss,
    "FMN": ForgetMeNotLoss,
    "AbConcept": AblatingConceptsLoss,
    "ESD": ESDLoss,
}
# Called with a model, a concept, the method's settings and the prompts to preserve.
SOLVERS: dict[str, Callable[..., DenseShift]] = {"UCE": solve_uce, "SPEED": solve_speed}


def check_method(model: DiffusionModel, config: MethodConfig) -> None:
    """Raise ValueError, saying what to choose instead, for a model that a method cannot change."""
    if config.name in SOLVERS:
        check_key_values(model, config)
    else:
        LOSSES[config.name].check(model, config)


def check_settings(model: TextModel, config: MethodConfig) -> None:
    """Raise ValueError for settings that make nothing, and for a method that the model is nothing for."""
    if not isinstance(model, DiffusionModel):
        if config.trains or not isinstance(config, SRSMEConfig):
            raise ValueError(
                f"{model.name} is a text encoder alone, from which nothing is trained: give a whole `model`"
            )
    elif config.name in SOLVERS:
        check_key_values(model, config)
    if isinstance(config, SRSMEConfig) and config.mode == "closed_form" and config.init == "zero":
        raise ValueError(
            "`mode` closed_form trains nothing from `init` zero: choose `init` closed_form, or `mode` learn"
        )


def made_from(inputs: Mapping[str, Any], existing: Mapping[str, Any], method: str) -> bool:
    """Return whether a shift's metadata says that it was made from these inputs, whatever program wrote it."""
    left_out = {"created_by", *(key for key in ADDED_KEYS if key not in existing)}
    for key, value in inputs.items():
        if key == "config":
            config = existing.get("config", {})
            if not isinstance(config, dict) or not value.items() <= complete_settings(method, config).items():
                return False
        elif key == "gate_config" and isinstance(existing.get(key), dict):
            if complete_gate_settings(existing[key]) != value:
                return False
        elif key not in left_out and existing.get(key) != value:
            return False
    return True
