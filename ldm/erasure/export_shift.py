"""Shifts as small files to share: each with a card for people, and beside it what is too long for its header."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from ldm.diffusion.family import STATES_KEY
from ldm.diffusion.model import DiffusionModel
from ldm.diffusion.text_model import TextModel
from ldm.erasure.effect import judge
from ldm.erasure.export_metadata import file_stem
from ldm.erasure.merge import spellings_of
from ldm.erasure.portable import forms_of, measured_on, replacements
from ldm.erasure.shift import SHIFT_FILE_TYPE, EmbeddingShift, WeightShift
from ldm.erasure.shift_file import OF_ENCODERS, changed_from, part_prefix, split_parts
from ldm.io.files import write_text
from ldm.io.tensors import LazyTensors, load_tensors, save_tensors

_LOADER, _CARD = Path(__file__).with_stem("card_loader"), Path(__file__).with_name("shift_card.md")
# What a shift's header says in such a file. Lists of prompts and all settings stand beside it.
_IN_HEADER = (
    *OF_ENCODERS,
    *("created_by", "method", "category", "concept_index", "concept"),
    *("concept_kind", "aliases", "prompt", "anchor", "iterations", "target_change", "max_leakage_protected", "effects"),
)
_BY = {"linear": "by the weights", "gated": "by the gate"}
_OF_GATE = ("layers", "penalties", "gap", "false_alarms", "misses")


def save_shifts(model: DiffusionModel, shifts: Mapping[str, WeightShift], folder: Path, dtype: torch.dtype) -> None:
    """Write a file for each shift, with its card, and a JSON file of what is too long for its header.

    What they say of effect and leakage is measured on `model` with the shift as it is written, rounded to `dtype`.
    """
    for label, shift in shifts.items():
        rounded = as_written(shift, dtype)
        metadata = measured_on(model, rounded).metadata
        metadata |= {"base_digest": model.digest, "base_model": model.config_name}
        tensors = rounded.tensors(dtype, metadata.get("streams", {}))
        if rounded.gated is not None:
            tensors |= rounded.gated.tensors(dtype)
            metadata["gate"] = rounded.gated.metadata
        path = folder / f"{file_stem(label, shift)}.safetensors"
        save_tensors(path, tensors, SHIFT_FILE_TYPE, _header(metadata), beside=metadata)
        write_text(path.with_suffix(".md"), _card(path, rounded, metadata, dtype, model))


def _header(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return what of a shift's metadata is in the header of a small file."""
    header = {name: metadata[name] for name in _IN_HEADER if name in metadata}
    if "gate" in metadata:
        header["gate"] = {name: metadata["gate"][name] for name in _OF_GATE if name in metadata["gate"]}
    if "parts" in metadata:
        header["parts"] = [_header(part) for part in metadata["parts"]]
    return header


def join_shifts(paths: Sequence[Path], target: Path) -> pd.DataFrame:
    """Write the files of one concept's shifts, made on several text encoders, as one new file.

    Return a row for each of its parts. Raises ValueError for files of several concepts, for two made on the same
    embeddings of the same text encoder, for a shift that is bound to a denoiser's weights, and where `target` is there
    already, whose card or ledger would then be another file's.
    """
    if target.exists():
        raise ValueError(f"{target} is there already: give another `save_path`")
    parts: list[tuple[Path, LazyTensors, dict[str, Any]]] = []
    for path in paths:
        shift = WeightShift.load(path, "give the files of a concept's shifts")
        if not isinstance(shift, EmbeddingShift) or "text_digest" not in shift.metadata:
            raise ValueError(f"{path} changes the weights of one denoiser alone: give shifts in closed form, or gates")
        parts += [(path, *part) for part in split_parts(path, *load_tensors(path, SHIFT_FILE_TYPE))]
    first = parts[0][2]
    known: dict[str, Path] = {}
    for path, _, metadata in parts:
        if not set(spellings_of(metadata)) & set(spellings_of(first)):
            raise ValueError(
                f"{path} erases {metadata['concept']}, and {paths[0]} {first['concept']}: give one's files"
            )
        made_on = json.dumps([metadata.get(name) for name in ("text_digest", "streams", STATES_KEY)])
        if made_on in known:
            raise ValueError(f"{known[made_on]} and {path} were made on the same text encoder: give one of them")
        known[made_on] = path
    tensors: dict[str, torch.Tensor] = {}
    rows: list[dict[str, Any]] = []
    for number, (_, own, metadata) in enumerate(parts, start=1):
        read = {f"{part_prefix(number)}{name}": own[name] for name in own}
        tensors |= read
        streams = ", ".join(sorted(metadata.get("streams", ["tokens"]), reverse=True))
        size = sum(tensor.nbytes for tensor in read.values())
        rows.append({"made on": metadata.get("base_model"), "changes": streams, "bytes": size})
    said = [{name: value for name, value in metadata.items() if name != "beside"} for _, _, metadata in parts]
    whole = said[0] | {"parts": [changed_from(said[0], part) for part in said[1:]]}
    is_small = any("beside" in metadata for _, _, metadata in parts)
    save_tensors(target, tensors, SHIFT_FILE_TYPE, _header(whole) if is_small else whole, whole if is_small else None)
    return pd.DataFrame(rows)


def as_written(shift: WeightShift, dtype: torch.dtype) -> EmbeddingShift:
    """Return a shift of embeddings as a file in `dtype` has it.

    Raises ValueError for one that is bound to a denoiser's weights, and for numbers that files do not have.
    """
    if not isinstance(shift, EmbeddingShift):
        raise ValueError(
            f"{shift.path} changes the weights of one denoiser, and no other takes it: make it again in closed form "
            "(`mode` closed_form), or choose another `format`"
        )
    if dtype not in (torch.float32, torch.float16):
        raise ValueError("shifts are written in float32 or float16: give `save_dtype` one of these")
    return shift.rounded(dtype)


def _card(path: Path, shift: EmbeddingShift, metadata: Mapping[str, Any], dtype: torch.dtype, model: TextModel) -> str:
    """Return the text of a shift's card, for whoever has a pipeline of the model's class."""
    loader = re.sub(r"  # noqa.*", "", _LOADER.read_text(encoding="utf-8"))
    prompt, gate = str(metadata.get("prompt", "")), shift.gated
    names = list(dict.fromkeys([metadata["concept"], prompt, *metadata.get("aliases", ())]))
    forms = forms_of(shift)
    card = _CARD.read_text(encoding="utf-8")
    loads_gate = gate is not None and (
        model.family == "FluxPipeline" or (model.family == "StableDiffusionPipeline" and len(gate.gates) == 1)
    )
    acts = "by its gate" if loads_gate else "by its change of weights"
    if gate is not None and not loads_gate:
        acts += ": its gate needs this program"
    if not loads_gate and not shift.rank:  # of which the loader in the card can do nothing
        card = card.partition("\n## Without it")[0]
    return card.format(
        concept=metadata["concept"],
        base=metadata["base_model"],
        digest=str(metadata["text_digest"])[:19],
        names=", ".join(names),
        state=_state(metadata, forms),
        anchor=_replacement(metadata, forms),
        file=path.name,
        size=path.stat().st_size,
        dtype=str(dtype).removeprefix("torch."),
        rank=shift.rank,
        gate_size=""
        if gate is None
        else f", and a gate with a map of rank {max(len(found.directions) for found in gate.maps.values())}",
        method=metadata.get("method", ""),
        num_protected=len(metadata.get("protected", ())),
        beside=path.with_suffix(".json").name,
        measured="\n".join(f"| {name} | {value} |" for name, value in _measured(metadata, shift.is_gate_alone)),
        typed_file=shlex.quote(path.name),
        typed_prompt=shlex.quote(prompt),
        quoted_file=json.dumps(path.name, ensure_ascii=False),
        quoted_prompt=json.dumps(prompt, ensure_ascii=False),
        pipeline=model.family,
        acts=acts,
        no_gate=", gated=False" if gate is not None and not loads_gate else "",
        call=_call_options(model),
        loader=loader,
    )


def _call_options(model: TextModel) -> str:
    """Return what a call of the model's pipeline is told beside the prompt, to read and draw as this program does."""
    if not model.adapter.samples_by_call:
        return ""
    tokens = {"max_sequence_length": model.adapter.prompt_options(model.pipeline)["max_sequence_length"]}
    side = model.adapter.image_size(model.pipeline)
    options = {"height": side, "width": side, **tokens, **model.adapter.call_options}
    return "".join(f", {name}={value}" for name, value in options.items())


def _state(metadata: Mapping[str, Any], forms: Sequence[str]) -> str:
    """Return in a few words whether a shift erases its concept, by what was measured of it in each form."""
    found = {form: judge(metadata, form)[0] for form in forms}
    erasing = [_BY[form] for form, is_erased in found.items() if is_erased]
    if len(erasing) == len(forms):
        return "erased from"
    if erasing:
        return f"erased {erasing[0]} alone from"
    return "a shift whose effect is not known, for" if None in found.values() else "a shift too weak to erase it, for"


def _replacement(metadata: Mapping[str, Any], forms: Sequence[str]) -> str:
    """Return what takes the place of a shift's concept, in each form in which it can act."""
    found = {form: text or "nothing: the empty prompt" for form, text in replacements(metadata, forms).items()}
    if len(set(found.values())) > 1:
        return ", ".join(f"{text} ({_BY[form]})" for form, text in found.items())
    return next(iter(found.values()), "not known here: see its settings")


def _measured(metadata: Mapping[str, Any], gate_alone: bool) -> list[tuple[str, str]]:
    """Return what was measured of a shift, each with what it is."""
    rows: list[tuple[str, str]] = []
    for form, said in metadata.get("effects", {}).items():
        if said:
            text = f"{said['mean']:.2f} on average, {said['least']:.2f} on the lowest prompts (1 is all of the way)"
            rows.append((f"effect of the {'gate and map' if form == 'gated' else 'change of weights'}", text))
    if "target_change" in metadata:
        rows.append(("change of the outputs for its own name", f"{metadata['target_change']:.2g}"))
    if "max_leakage_protected" in metadata:
        by = "" if gate_alone else ", by the weights"
        rows.append((f"largest change for a protected prompt{by}", f"{metadata['max_leakage_protected']:.1e}"))
    for name, text in (
        ("false_alarms", "everyday captions that trip the gate"),
        ("misses", "held-out prompts it misses"),
    ):
        found = metadata.get("gate", {}).get(name)
        if found:
            rows.append((text, f"{found[0]} of {found[1]} (95 %: {found[2]:.2%} to {found[3]:.2%})"))
    return rows
