"""What the header of an exported file says to other programs and to ours, and the file in the same bytes each time.

The keys `modelspec.*` are ModelSpec's (github.com/Stability-AI/ModelSpec), the keys `ss_*` and `sshs_*` those that
sd-scripts writes and that A1111 and ComfyUI read. Only what is true of a shift is said: nothing of images (so no
`ss_tag_frequency`), no date, and no `modelspec.trigger_phrase`, which programs add to a prompt: an erasure needs none.
A model whose architecture has no name there has no key `modelspec.*`: the specification has none without that name.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from ldm.config.concepts import OWN
from ldm.diffusion.family import ModelSpec
from ldm.diffusion.model import DiffusionModel
from ldm.erasure.shift import WeightShift
from ldm.io.tensors import CREATED_BY, METADATA_KEY, named_writes

_SPEC_VERSION = "1.0.0"
_DIFFUSERS = "diffusers"
_STRENGTH = "Strength 1 erases the concept, strength 0 restores it."
_HASHES = {"modelspec.hash_sha256": "0x", "sshs_model_hash": ""}  # of the tensors' bytes, each with its prefix


def file_stem(label: str, shift: WeightShift) -> str:
    """Return such as 3-Jackson-Pollock, or red-fox where a user named it; nothing in it leads out of the folder."""
    name = shift.metadata.get("concept", "shift")
    is_own = shift.metadata.get("category") == OWN
    return re.sub(r"\W+", "-", name if is_own else f"{label}-{name}").strip("-") or label


def lora_metadata(
    model: DiffusionModel, label: str, shift: WeightShift, tensors: Mapping[str, torch.Tensor], is_kohya: bool
) -> dict[str, str]:
    """Return what the header of a concept's LoRA says, with `tensors` in peft's keys, in kohya's layout or diffusers'.

    Layers of different ranks, as those of two streams may have, are what sd-scripts calls Dynamic.
    """
    known, concept = model.adapter.model_spec(model.pipeline), shift.metadata.get("concept", label)
    ranks = sorted({len(tensor) for name, tensor in tensors.items() if ".lora_A." in name})
    said_rank = " and ".join(map(str, ranks)) or "0"
    dim = "Dynamic" if len(ranks) > 1 else said_rank
    spec = _model_spec(
        model,
        replace(known, implementation=known.implementation if is_kohya else _DIFFUSERS),
        f"{concept} erased from {model.config_name}",
        f"A LoRA of rank {said_rank} that erases {concept} from {model.config_name}, made by {CREATED_BY}.",
        {
            "modelspec.architecture": "/".join((known.architecture, "lora")),
            "modelspec.usage_hint": _STRENGTH,
            "modelspec.category": "Concept erasure",  # and not "Style", where programs list what adds one
            "modelspec.tags": str(concept),
        },
    )
    kohya = {
        "ss_base_model_version": known.version,
        "ss_network_alpha": dim,
        "ss_network_dim": dim,
        "ss_network_module": known.network if is_kohya else "",
        "ss_output_name": file_stem(label, shift),
        "ss_sd_model_name": model.config_name,
        "ss_training_comment": f"erases {concept}. {_STRENGTH}",
        "ss_v2": str(known.is_v2),
    }
    said = {key: value for key, value in kohya.items() if value}
    return {METADATA_KEY: _own_metadata(model, {label: shift}, "LoRA")} | spec | said


def merged_metadata(
    model: DiffusionModel, shifts: Mapping[str, WeightShift], file_type: str, implementation: str = _DIFFUSERS
) -> dict[str, str]:
    """Return what the header of merged weights says, whose names are those of `implementation`."""
    concepts = ", ".join(str(shift.metadata.get("concept", label)) for label, shift in shifts.items())
    spec = _model_spec(
        model,
        replace(model.adapter.model_spec(model.pipeline), implementation=implementation),
        f"{model.config_name} with {len(shifts)} erased",
        f"{model.config_name}, from which {CREATED_BY} erased: {concepts or 'nothing'}.",
        {"modelspec.merged_from": model.config_name},
    )
    return {METADATA_KEY: _own_metadata(model, shifts, file_type)} | spec


def _model_spec(
    model: DiffusionModel, known: ModelSpec, title: str, description: str, more: Mapping[str, str]
) -> dict[str, str]:
    """Return ModelSpec's keys, and hashes that `save_with_metadata` fills in; a date would change a repeated export.

    There are none for an architecture without a name, which the specification asks for.
    """
    if not known.architecture:
        return {}
    spec = {
        "modelspec.sai_model_spec": _SPEC_VERSION,
        "modelspec.architecture": known.architecture,
        "modelspec.implementation": known.implementation,
        "modelspec.title": title,
        "modelspec.description": description,
        "modelspec.resolution": f"{model.image_size}x{model.image_size}",
        **_HASHES,
    }
    return spec | ({"modelspec.prediction_type": known.prediction_type} if known.prediction_type else {}) | dict(more)


def _own_metadata(model: DiffusionModel, shifts: Mapping[str, WeightShift], file_type: str) -> str:
    """Return as JSON what a file is, of which base model, and by which shifts: each with its `scale`, that of dW."""
    described: dict[str, dict[str, Any]] = {}
    for label, shift in shifts.items():
        known = {key: shift.metadata[key] for key in ("concept", "prompt", "method") if key in shift.metadata}
        known |= {"rank": shift.rank, "scale": 1.0}  # alpha / rank of a LoRA; what a shift is multiplied by in a merge
        if shift.content_digest:
            known["content_digest"] = shift.content_digest
        described[label] = known
    metadata = {"base_model": model.config_name, "base_digest": model.digest, "shifts": described}
    return json.dumps({"file_type": file_type, "created_by": CREATED_BY, "metadata": metadata}, sort_keys=True)


def save_with_metadata(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    """Write safetensors with several entries of metadata: the same content gives the same bytes.

    safetensors writes the entries in random order, and everything else in one: here they are put in order afterwards,
    and the hashes among them filled in.
    """
    contents = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    hashes = {key: prefix + "0" * 64 for key, prefix in _HASHES.items() if key in metadata}
    with named_writes(path):
        save_file(contents, path, metadata={"format": "pt", **metadata, **hashes})
    with open(path, "r+b") as opened:
        size = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(size))
        digest = hashlib.file_digest(opened, "sha256").hexdigest()  # of what follows the header
        hashes = {key: _HASHES[key] + digest for key in hashes}
        header["__metadata__"] = dict(sorted((header["__metadata__"] | hashes).items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) > size:
            raise RuntimeError(f"the header of {path} has not the size that safetensors gave it")
        opened.seek(8)
        opened.write(text.ljust(size))
