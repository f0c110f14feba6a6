"""The methods by name: the loss of each. Their settings are `ldm.config.methods.METHODS`."""

from __future__ import annotations

from typing import Any

from ldm.erasure.losses import (
    AblatingConceptsLoss,
    ESDLoss,
    ForgetMeNotLoss,
    FullCorrelationLoss,
    SRSMELoss,
)

# The joint variant's parts are SRS-ME's losses, which JointSRSMELoss balances.
LOSSES: dict[str, Any] = {
    "SRS-ME": SRSMELoss,
    "SRS-ME-dagger": SRSMELoss,
    "SRS-ME-double-dagger": FullCorrelationLoss,
    "FMN": ForgetMeNotLoss,
    "AbConcept": AblatingConceptsLoss,
    "ESD": ESDLoss,
}
