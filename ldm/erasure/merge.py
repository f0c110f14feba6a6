"""Merging shifts: which ones, into new weights, or into a model for as long as a block runs."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn

from ldm.config.concept_lists import make_concept
from ldm.config.concepts import (
    CATEGORIES,
    INDEX_RANGE_RE,
    OWN,
    find_by_name,
    get_concept,
    is_one_of,
    load_concepts,
    parse_indexes,
)
from ldm.config.methods import METHODS, SRSMEConfig
from ldm.config.settings import did_you_mean
from ldm.diffusion.edits import edit_embeddings, replace_parameters
from ldm.diffusion.model import DiffusionModel
from ldm.diffusion.text_layers import text_layers
from ldm.diffusion.text_model import TextModel
from ldm.erasure.gated_edit import GatedEdit, GatedPrompts
from ldm.erasure.layer_rows import as_rows, in_weight
from ldm.erasure.shift import SHIFT_FILE_TYPE, EmbeddingShift, WeightShift
from ldm.io.errors import MissingFileError, notify
from ldm.io.paths import SHIFT_SUFFIX, ArtifactPaths, merge_name
from ldm.io.tensors import read_metadata

_MAX_REPORTED = 30  # protected prompts on which leakage is reported


@dataclass(frozen=True)
class _Block:
    """Shifts of embeddings that are summed up together, known by the digests of their files, if they have such."""

    digests: tuple[str, ...]
    width: int
    factors: tuple[tuple[torch.Tensor, torch.Tensor], ...] = field(compare=False)

    @classmethod
    def of(cls, shifts: Sequence[EmbeddingShift]) -> Self:
        """Return the block of some shifts. One that is not as its file has it is known by its tensors."""
        digests = []
        for shift in shifts:
            is_as_read = shift.content_digest and shift.is_whole and "truncated_to_rank" not in shift.metadata
            digests.append(shift.content_digest if is_as_read else f"made {id(shift.outputs)}")
        factors = tuple((shift.outputs, shift.directions) for shift in shifts)
        return cls(tuple(digests), len(shifts[0].outputs), factors)


@lru_cache(maxsize=2 * 16)  # so that a concept that is switched among many costs its own block
def _sum_up(block: _Block) -> torch.Tensor:
    """Return the sum of A S over the shifts of a block, (d, d), float64."""
    outputs = torch.cat([outputs for outputs, _ in block.factors], dim=1)  # (d, all k)
    return outputs @ torch.cat([directions for _, directions in block.factors])


class SummedShifts:
    """Several shifts as one: weights W of the text layers become `W (I + M) + D`, those of other layers `W + D`.

    M (d, d) is the sum of A S of the shifts of embeddings, taken once for all layers, and D that of the others' dW. M
    is the same in whatever order the shifts are: they are in that of their files' digests. Of a layer M is what it sees
    of it, and its columns that are not the text's stay.
    """

    def __init__(self, shifts: Sequence[WeightShift], layers: Mapping[str, nn.Linear]):
        """Sum up shifts for a denoiser with these text layers."""
        shifts, self._layers = [shift.on(layers) for shift in shifts], layers
        self._others = [shift for shift in shifts if not isinstance(shift, EmbeddingShift)]
        of_embeddings = [shift for shift in shifts if isinstance(shift, EmbeddingShift) and shift.rank]
        changed: dict[str, None] = {}
        for shift in of_embeddings:
            changed |= dict.fromkeys(shift.parameter_names)
        self._text_weights = [f"{name}.weight" for name in layers if f"{name}.weight" in changed]
        blocks: dict[str, list[EmbeddingShift]] = {}
        for shift in sorted(of_embeddings, key=lambda shift: shift.content_digest):
            blocks.setdefault(shift.content_digest[:1], []).append(shift)
        self._change = sum((_sum_up(_Block.of(shifts)) for shifts in blocks.values()), torch.zeros(()))

    @property
    def parameter_names(self) -> list[str]:
        """The names of the parameters that any of the shifts changes."""
        changed = dict.fromkeys(self._text_weights)
        for shift in self._others:
            changed |= dict.fromkeys(shift.parameter_names)
        return list(changed)

    def merged(self, weight: torch.Tensor, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Return what becomes of one parameter: summed in float64, rounded once, to `dtype` or the weight's own."""
        base = weight.detach().cpu().double()
        total = base
        if name in self._text_weights:
            layer = name.removesuffix(".weight")
            rows = as_rows(self._layers, layer, base)
            whole = rows.shape == base.shape
            total = (
                torch.addmm(base, rows, self._change)
                if whole
                else base + in_weight(self._layers, layer, rows @ self._change)
            )
        deltas = (shift.delta_weight(name) for shift in self._others if name in shift.parameter_names)
        return sum(deltas, total).to(weight.device, dtype or weight.dtype)


def merge(unet: nn.Module, shifts: Sequence[WeightShift], dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
    """Return the weights that any shift changes, with all of them, by `SummedShifts`. Nothing is changed."""
    summed = SummedShifts(shifts, text_layers(unet))
    return {name: summed.merged(unet.get_parameter(name), name, dtype) for name in summed.parameter_names}


@contextmanager
def applied(unet: nn.Module, shifts: Sequence[WeightShift]) -> Generator[None]:
    """While the block runs, let the U-Net hold the merged weights; then the very same base tensors are back."""
    merged = {name: nn.Parameter(weight, requires_grad=False) for name, weight in merge(unet, shifts).items()}
    with replace_parameters(unet, merged):
        yield


@contextmanager
def edited(model: DiffusionModel, shifts: Mapping[str, WeightShift], form: str) -> Generator[None]:
    """While the block runs, let the model be without the concepts of `shifts`; then it is the very base model again.

    In the `form` gated a shift acts on the prompts that trip its gate, in the form linear on the weights, as `by_form`
    says. Raises ValueError for a gate that does not fit the model, and as `check_unedited`.
    """
    check_unedited(model)
    gated, linear = by_form(shifts, form)
    with applied(model.denoiser, list(linear.values())), edit_embeddings(model, gated_prompts(model, gated)):
        model.edited_by = tuple(shifts)
        try:
            yield
        finally:
            model.edited_by = ()


def check_unedited(model: TextModel) -> None:
    """Raise ValueError while shifts act on a model: what is made of it then would hold them twice, or not at all."""
    if model.edited_by:
        raise ValueError(
            f"{model.name} is without {', '.join(model.edited_by)} as long as this block runs: end it first, or give "
            "all shifts to one block"
        )


def gated_prompts(model: TextModel, gated: Mapping[str, WeightShift]) -> GatedPrompts | None:
    """Return what the gates of shifts together make of prompts' embeddings; None for no shift.

    Raises ValueError for a gate that does not fit the model.
    """
    edits: dict[str, GatedEdit] = {}
    for label, shift in gated.items():
        if shift.gated is not None:
            shift.gated.check(model.text_encoders, model.places, shift.path)
            edits[label] = shift.gated
    return GatedPrompts(edits, model.places) if edits else None


def by_form(shifts: Mapping[str, WeightShift], form: str) -> tuple[dict[str, WeightShift], dict[str, WeightShift]]:
    """Return the shifts that act by their gates, and those that act on the weights, where `form` is asked for.

    One without a gate acts on the weights in either form, and a gate alone by itself.
    """
    has_gate = [label for label, shift in shifts.items() if shift.gated is not None]
    gated = {label: shifts[label] for label in has_gate if form == "gated" or shifts[label].is_gate_alone}
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


def load_shifts(artifacts: ArtifactPaths, named: str | Sequence[str]) -> tuple[dict[str, WeightShift], str]:
    """Return shifts by label, and the name of their merge, for '0,1,2', '0-99', shift files, or names of concepts.

    Indexes and files may be separated by commas; a name is a text of its own. A label is the concept's own; that of
    one of another category has the category before it, and that of a further shift of a concept, by another method, has
    the method behind it. The name is '012', or 'ori' for none; shifts of another method than SRS-ME put its name before
    it: 'FMN-012'. Raises ValueError for a file that does not say what it erases, and for a concept named twice with the
    same method.
    """
    shifts: dict[str, WeightShift] = {}
    methods: dict[str, None] = {}
    for path, expected in _shift_paths(artifacts, [named] if isinstance(named, str) else named):
        shift = WeightShift.load(path, "give an index such as 0, a concept's name, or the path of a shift file")
        metadata = shift.metadata
        index, category = metadata.get("concept_index"), metadata.get("category", artifacts.category)
        method = metadata.get("method", SRSMEConfig.name)
        is_own = category == OWN and index is None and bool(metadata.get("concept"))
        if method not in METHODS or not (is_own or (type(index) is int and category in CATEGORIES)):
            raise ValueError(f"{path} does not say which concept it erases, and by which method: make it again")
        if expected is not None and (index, category, method) != (expected, artifacts.category, artifacts.method):
            raise ValueError(
                f"{path} is the shift of {category} {index} by {method}, not of {artifacts.category} {expected} by "
                f"{artifacts.method}: make it again, or name the file itself"
            )
        label = make_concept(metadata["concept"]).label if is_own else str(index)
        if not is_own and category != artifacts.category:
            label = f"{category}{index}"
        if label in shifts and shifts[label].metadata.get("method", SRSMEConfig.name) != method:
            notify(f"{path} and another method's shift of {label} act together, and go further than either")
            label = f"{label}-{method}"
        if label in shifts:
            raise ValueError(f"`shifts` names the shift of {label} twice: name each once")
        shifts[label] = shift
        methods[method] = None
    prefix = "".join(f"{method}-" for method in methods) if list(methods) != [SRSMEConfig.name] else ""
    return shifts, prefix + merge_name(shifts) or "ori"


def spellings_of(metadata: Mapping[str, Any]) -> list[str]:
    """Return what names the concept of a shift, as its metadata say."""
    names = [metadata.get("concept"), metadata.get("prompt"), *metadata.get("aliases", ())]
    return [name for name in names if isinstance(name, str)]


def reported_prompts(shifts: Mapping[str, WeightShift], category: str) -> list[str]:
    """Return the prompts on which the leakage of shifts is reported: the empty one, their own, and those that stay.

    The latter are the concepts of the category, or, of shifts that a user named, the first that these protect.
    """
    own = [str(shift.metadata.get("prompt", "")) for shift in shifts.values()]
    if all(shift.metadata.get("category") == OWN for shift in shifts.values()):
        stay: dict[str, None] = {}
        for shift in shifts.values():
            stay |= dict.fromkeys(shift.metadata.get("protected", ()))
        others = list(stay)[:_MAX_REPORTED]
    else:
        others = [concept.prompt for concept in load_concepts(category)]
    return list(dict.fromkeys(["", *others, *own]))


def _shift_paths(artifacts: ArtifactPaths, named: Sequence[str]) -> list[tuple[Path, int | None]]:
    """Return the file of each shift that texts name, with the index where it is named by that."""
    paths: list[tuple[Path, int | None]] = []
    for text in named:
        pieces = [piece.strip() for piece in text.split(",")] if text.strip() else []
        if not all(pieces):
            raise ValueError(f"`shifts` '{text}' has nothing between two commas: name each shift, or none")
        if not all(_is_file(piece) or INDEX_RANGE_RE.fullmatch(piece) for piece in pieces):
            paths.append(_find_named(artifacts, text))
            continue
        for piece in pieces:
            if _is_file(piece):
                paths.append((Path(piece), None))
                continue
            for index in parse_indexes(piece, artifacts.category):
                concept = get_concept(artifacts.category, index)
                paths.append((artifacts.find_shift(concept.label, concept.name), index))
    return paths


def _is_file(text: str) -> bool:
    return text.lower().endswith(SHIFT_SUFFIX) or Path(text).is_file()


def _find_named(artifacts: ArtifactPaths, text: str) -> tuple[Path, int | None]:
    """Return the shift of the concept that a text names, with its index where it is one of the category.

    Raises MissingFileError where there is none, and ValueError with the nearest name where one is near.
    """
    concept, own = make_concept(text), replace(artifacts, category=OWN)
    known: list[str] = []
    for path in own.all_shifts():
        metadata = read_metadata(path, SHIFT_FILE_TYPE)
        names = spellings_of(metadata)
        if is_one_of(text, names):
            return path, None
        known += names
    listed = find_by_name(artifacts.category, text)
    if listed is not None:
        return artifacts.find_shift(listed.label, listed.name), listed.index
    near = did_you_mean(text, known)
    message = f"no shift that erases '{text}' at {own.shift(concept.label)}{near}"
    if near:
        raise ValueError(message)
    raise MissingFileError(message, "shift", **own.details(concept.label), concept=text)
