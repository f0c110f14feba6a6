"""Merging shifts: which ones, into new weights, or into a model for as long as a block runs."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ldm.config.concepts import CATEGORIES, INDEX_RANGE_RE, get_concept, parse_indexes
from ldm.config.methods import METHODS, SRSMEConfig
from ldm.diffusion.edits import edit_embeddings, replace_parameters
from ldm.diffusion.model import DiffusionModel
from ldm.erasure.gated_edit import GatedEdit, GatedPrompts
from ldm.erasure.shift import WeightShift
from ldm.io.paths import ArtifactPaths, merge_name


def merged_weight(
    weight: torch.Tensor, name: str, shifts: Sequence[WeightShift], dtype: torch.dtype | None = None
) -> torch.Tensor:
    """Return `W + sum of dW` of one parameter: summed in float64 and rounded once, to `dtype` or the weight's own."""
    total = weight.detach().cpu().double()
    deltas = (shift.delta_weight(name) for shift in shifts if name in shift.parameter_names)
    return sum(deltas, total).to(weight.device, dtype or weight.dtype)


def merge(unet: nn.Module, shifts: Sequence[WeightShift], dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
    """Return `W + sum of dW` for the parameters that any shift changes, by `merged_weight`. Nothing is changed."""
    changed: dict[str, None] = {}
    for shift in shifts:
        changed |= dict.fromkeys(shift.parameter_names)
    return {name: merged_weight(unet.get_parameter(name), name, shifts, dtype) for name in changed}


@contextmanager
def applied(unet: nn.Module, shifts: Sequence[WeightShift]) -> Generator[None]:
    """While the block runs, let the U-Net hold the merged weights; then the very same base tensors are back."""
    merged = {name: nn.Parameter(weight, requires_grad=False) for name, weight in merge(unet, shifts).items()}
    with replace_parameters(unet, merged):
        yield


@contextmanager
def edited(model: DiffusionModel, shifts: Mapping[str, WeightShift], form: str) -> Generator[None]:
    """While the block runs, let the model be without the concepts of `shifts`; then it is the very base model again.

    In the `form` gated a shift acts on the prompts that trip its gate, in the form linear on the weights, which is also
    what one without a gate does. Raises ValueError for a gate that does not fit the model.
    """
    gated, linear = by_form(shifts, form)
    with applied(model.unet, list(linear.values())), edit_embeddings(model, gated_prompts(model, gated)):
        yield


def gated_prompts(model: DiffusionModel, gated: Mapping[str, WeightShift]) -> GatedPrompts | None:
    """Return what the gates of shifts together make of prompts' embeddings; None for no shift.

    Raises ValueError for a gate that does not fit the model.
    """
    edits: dict[str, GatedEdit] = {}
    for label, shift in gated.items():
        if shift.gated is not None:
            shift.gated.check(model.text_encoders, model.context_dim, shift.path)
            edits[label] = shift.gated
    return GatedPrompts(edits) if edits else None


def by_form(shifts: Mapping[str, WeightShift], form: str) -> tuple[dict[str, WeightShift], dict[str, WeightShift]]:
    """Return the shifts that act by their gates, and those that act on the weights, where `form` is asked for."""
    gated = {label: shift for label, shift in shifts.items() if form == "gated" and shift.gated is not None}
    return gated, {label: shift for label, shift in shifts.items() if label not in gated}


def describe_forms(shifts: Mapping[str, WeightShift], form: str) -> str:
    """Return which of the shifts act in which form, in a line."""
    gated, linear = by_form(shifts, form)
    parts = []
    for name, group in (("gated", gated), ("linear", linear)):
        if group:
            lacking = " (without a gate)" if name == "linear" and form == "gated" else ""
            parts.append(f"{name}{lacking}: {', '.join(group)}")
    return "; ".join(parts) or "no shift"


def shifts_metadata(shifts: Mapping[str, WeightShift], form: str) -> dict[str, Any]:
    """Return what a folder of images says of the shifts that acted, and in which form where that is not on weights."""
    metadata: dict[str, Any] = {"shifts": {label: shift.provenance for label, shift in shifts.items()}}
    gated = list(by_form(shifts, form)[0])
    return metadata | ({"gated": gated} if gated else {})


def load_shifts(artifacts: ArtifactPaths, text: str) -> tuple[dict[str, WeightShift], str]:
    """Return shifts by label, and the name of their merge, for '0,1,2', '0-99' or shift files, separated by commas.

    A label is the concept's index, with its category before it when that is another one. The name is '012', or 'ori'
    for none; shifts of another method than SRS-ME put its name before it: 'FMN-012'. Raises ValueError for a file that
    does not say what it erases, and for a concept named twice.
    """
    shifts: dict[str, WeightShift] = {}
    methods: dict[str, None] = {}
    for path, expected in _shift_paths(artifacts, text):
        shift = WeightShift.load(path, "give an index such as 0, or the path of a shift file")
        index, category = shift.metadata.get("concept_index"), shift.metadata.get("category", artifacts.category)
        method = shift.metadata.get("method", SRSMEConfig.name)
        if type(index) is not int or category not in CATEGORIES or method not in METHODS:
            raise ValueError(f"{path} does not say which concept it erases, and by which method: make it again")
        if expected is not None and (index, category, method) != (expected, artifacts.category, artifacts.method):
            raise ValueError(
                f"{path} is the shift of {category} {index} by {method}, not of {artifacts.category} {expected} by "
                f"{artifacts.method}: make it again, or name the file itself"
            )
        label = str(index) if category == artifacts.category else f"{category}{index}"
        if label in shifts:
            raise ValueError(f"`shifts` names the shift of {label} twice: name each once")
        shifts[label] = shift
        methods[method] = None
    prefix = "".join(f"{method}-" for method in methods) if list(methods) != [SRSMEConfig.name] else ""
    return shifts, prefix + merge_name(shifts) or "ori"


def _shift_paths(artifacts: ArtifactPaths, text: str) -> list[tuple[Path, int | None]]:
    """Return the file of each shift that `text` names, with the index where it is named by that."""
    paths: list[tuple[Path, int | None]] = []
    for piece in text.split(",") if text.strip() else ():
        piece = piece.strip()
        if not piece:
            raise ValueError(f"`shifts` '{text}' has nothing between two commas: name each shift, or none")
        if INDEX_RANGE_RE.fullmatch(piece):
            concepts = [get_concept(artifacts.category, index) for index in parse_indexes(piece, artifacts.category)]
            paths += [(artifacts.find_shift(concept.index, concept.name), concept.index) for concept in concepts]
        else:
            paths.append((Path(piece), None))
    return paths
