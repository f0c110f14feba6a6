"""Shifts that were made on another checkpoint, or on a text encoder alone, for a model that has the same text encoder.

They change the prompts' embeddings, so that they fit it. How far they change its outputs is its own: it is measured
anew, and stands in place of what the file says.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from copy import copy
from typing import Any

from ldm.config.concept_lists import make_concept, with_anchor
from ldm.config.concepts import Concept, get_concept
from ldm.config.methods import METHODS, SRSMEConfig, complete_settings
from ldm.config.templates import fill_anchor, load_template_set
from ldm.diffusion.text_model import TextModel
from ldm.erasure.effect import measure_effect
from ldm.erasure.leakage import EmbeddingCache, leakage
from ldm.erasure.shift import WeightShift
from ldm.erasure.targets import anchor_prompt
from ldm.erasure.transfer import fitted_to, needs_fitting
from ldm.io.errors import notify

_SHOWN = 3  # concepts that a notice names
_DIGITS = 4  # of what is measured anew, so that a folder of images says the same wherever it was measured


def take_shifts(model: TextModel, shifts: Mapping[str, WeightShift]) -> dict[str, WeightShift]:
    """Return shifts as they act on a model: those made on another denoiser, or on none, are measured on this one.

    A notice says which these are. Raises ValueError for a shift that is not for the model or its text encoder.
    """
    taken: dict[str, WeightShift] = {}
    unchanged: dict[str, list[str]] = {}  # names of concepts, by the streams that their shifts leave
    shared: dict[str, list[str]] = {}  # names of concepts, by that of the model that their shifts were made on
    for label, given in shifts.items():
        if needs_fitting(model, given):
            given, left = fitted_to(model, given)
            if left:
                unchanged.setdefault(", ".join(left), []).append(str(given.metadata.get("concept", label)))
        given.check(model)
        taken[label] = shift = given.on(model.text_layers)
        if is_foreign(shift, model):
            taken[label] = measured_on(model, shift)
            base = str(shift.metadata.get("base_model", "another model"))
            shared.setdefault(base, []).append(str(shift.metadata.get("concept", label)))
    for base, names in shared.items():
        more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        notify(
            f"{', '.join(names[:_SHOWN])}{more}: made for {base}'s text encoder, which this model ({model.name}) "
            "shares; what the shifts do is measured on this model"
        )
    for streams, names in unchanged.items():
        more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        notify(
            f"{', '.join(names[:_SHOWN])}{more}: made for some of the text encoders of {model.name}; what the others "
            f"give stays as it is: {streams}"
        )
    return taken


def is_foreign(shift: WeightShift, model: TextModel) -> bool:
    """Return whether a shift was measured on another denoiser than the model's, or on none."""
    return "text_digest" in shift.metadata and shift.metadata.get("base_digest") not in model.digests


def measured_on(model: TextModel, shift: WeightShift) -> WeightShift:
    """Return a shift whose metadata say what it does to the model's outputs, as far as they name its prompts."""
    measured = copy(shift)
    made_on = {"base_digest", "measured_on", "effects", "target_change", "max_leakage_protected"}
    measured.metadata = {name: value for name, value in shift.metadata.items() if name not in made_on}
    measured.metadata |= {"measured_on": model.name}
    prompt, protected = shift.metadata.get("prompt"), shift.metadata.get("protected")
    if isinstance(prompt, str) and protected:
        if shift.gated and shift.is_gate_alone:
            found = EmbeddingCache(model).gate_leakage(shift.gated, [*protected, prompt])
        else:
            embeds = model.embed_prompts(dict.fromkeys([*protected, prompt]))
            rows = leakage(model.text_layers, {"": shift}, embeds)
            found = {row["prompt"]: row["leakage"] for row in rows}
        changes = {text: float(f"{value:.{_DIGITS}g}") for text, value in found.items()}
        measured.metadata["target_change"] = changes.pop(prompt)
        measured.metadata["max_leakage_protected"] = max(changes.values())
    concept, config = _concept_of(shift.metadata), _config_of(shift.metadata)
    if concept is None or config is None:
        return measured
    effects: dict[str, Any] = {}
    for form in forms_of(shift):
        said = measure_effect(model, concept, shift, config, form).to_dict()
        effects[form] = {
            name: float(f"{value:.{_DIGITS}g}") if isinstance(value, float) else value for name, value in said.items()
        }
    measured.metadata["effects"] = effects
    return measured


def forms_of(shift: WeightShift) -> list[str]:
    """Return the forms in which a shift can act by its file."""
    return [*(["linear"] if shift.rank else []), *(["gated"] if shift.gated else [])]


def replacements(metadata: Mapping[str, Any], forms: Iterable[str]) -> dict[str, str]:
    """Return what takes the place of a concept's name by a shift in each of the forms, as its metadata say.

    That is a prompt, which may be empty. Nothing where the concept, or the settings, are not known here.
    """
    concept, config = _concept_of(metadata), _config_of(metadata)
    if concept is None or config is None:
        return {}
    neutral = load_template_set(concept.kind).neutral
    found = {"linear": anchor_prompt(concept, config, "{}", neutral)}
    to_empty = concept.anchor is None and metadata.get("gate_config", {}).get("gate_anchor") == "empty"
    found["gated"] = "" if to_empty else fill_anchor("{}", concept.anchor, neutral)
    return {form: found[form] for form in forms}


def _concept_of(metadata: Mapping[str, Any]) -> Concept | None:
    """Return the concept that a shift's metadata name; None where that is not known here."""
    name, index = metadata.get("concept"), metadata.get("concept_index")
    try:
        if index is not None:
            concept = get_concept(str(metadata.get("category")), index)
            return concept if concept.is_named(str(name)) else None
        concept = make_concept(str(name), metadata.get("concept_kind"), metadata.get("aliases", ()))
        anchor = metadata.get("anchor", concept.anchor_prompt)
        return concept if anchor == concept.anchor_prompt else with_anchor(concept, anchor, str(name))
    except ValueError:
        return None


def _config_of(metadata: Mapping[str, Any]) -> SRSMEConfig | None:
    """Return the settings that a shift was made with; None where they are not those of a closed form."""
    method, written = metadata.get("method"), metadata.get("config", {})
    if method not in METHODS:
        return None
    try:
        config = METHODS[method]().with_changes(**complete_settings(method, written))
    except ValueError:
        return None
    return config if isinstance(config, SRSMEConfig) else None
