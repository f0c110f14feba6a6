"""TODO erasure.methods."""

from __future__ import annotations

from ldm.erasure.losses import AblatingConceptsLoss, ESDLoss, ErasureMethod, ForgetMeNotLoss, FullCorrelationLoss, JointSRSMELoss, SRSMELoss


METHODS: dict[str, type[ErasureMethod]] = {
    "SRS-ME": SRSMELoss, "SRS-ME-dagger": JointSRSMELoss, "SRS-ME-double-dagger": FullCorrelationLoss,
    "FMN": ForgetMeNotLoss, "AbConcept": AblatingConceptsLoss, "ESD": ESDLoss}
