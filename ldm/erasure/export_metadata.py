"""What the header of an exported file says to other programs and to ours, and the file in the same bytes each time.

The keys `modelspec.*` are ModelSpec's (github.com/Stability-AI/ModelSpec), the keys `ss_*` and `sshs_*` those that
sd-scripts writes and that A1111 and ComfyUI read. Only what is true of a shift is said: nothing of images (so no
`ss_tag_frequency`), no date, and no `modelspec.trigger_phrase`, which programs add to a prompt: an erasure needs none.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionXLPipeline
from safetensors.torch import save_file
from transformers import CLIPTextModel

from ldm.config.concepts import OWN
from ldm.diffusion.model import DiffusionModel
from ldm.erasure.shift import WeightShift
from ldm.io.tensors import CREATED_BY, METADATA_KEY, named_writes

_SPEC_VERSION = "1.0.0"
_STABILITY = "https://github.com/Stability-AI/generative-models"  # what sd-scripts names for these layouts
_DIFFUSERS = "diffusers"
_STRENGTH = "Strength 1 erases the concept, strength 0 restores it."
_HASHES = {"modelspec.hash_sha256": "0x", "sshs_model_hash": ""}  # of the tensors' bytes, each with its prefix


# By pipeline, as ModelSpec and sd-scripts call it, which know Stable Diffusion 3 and FLUX.1 of these.
_ARCHITECTURES = {
    "StableDiffusion3Pipeline": ("stable-diffusion-3", "sd3"),
    "FluxPipeline": ("flux-1-dev", "flux1"),
    "PixArtAlphaPipeline": ("pixart-alpha", ""),
    "PixArtSigmaPipeline": ("pixart-sigma", ""),
    "SanaPipeline": ("sana", ""),
    "AuraFlowPipeline": ("auraflow", ""),
    "Flux2Pipeline": ("flux-2", ""),
    "Flux2KleinPipeline": ("flux-2-klein", ""),
    "Lumina2Pipeline": ("lumina-2", ""),
}


@dataclass(frozen=True)
class Family:
    """Which kind of model one is, as ModelSpec (`architecture`) and sd-scripts (`version`) call it."""

    architecture: str
    version: str
    is_v2: bool
    prediction_type: str

    @property
    def is_xl(self) -> bool:
        """Return whether it is Stable Diffusion XL."""
        return self.version.startswith("sdxl")


def family_of(model: DiffusionModel) -> Family:
    """Return a model's family by its structure, whatever it is called: its pipeline, text encoder and scheduler.

    Version 2 is told from 1 by the activation of its text encoder. A small model of the same structure counts as one,
    and one with another text encoder than CLIP as version 1.
    """
    own = _ARCHITECTURES.get(model.family)
    if own is not None:
        is_schnell = model.family == "FluxPipeline" and not model.denoiser.config.guidance_embeds
        architecture = "flux-1-schnell" if is_schnell else own[0]
        return Family(architecture, own[1], False, "" if model.adapter.is_flow else "epsilon")
    is_velocity = model.scheduler.config.get("prediction_type", "epsilon") == "v_prediction"
    prediction_type = "v" if is_velocity else "epsilon"
    if isinstance(model.pipeline, StableDiffusionXLPipeline):
        return Family("stable-diffusion-xl-v1-base", "sdxl_base_v1-0", False, prediction_type)
    suffix = "_v" if is_velocity else ""
    if not isinstance(model.text_encoder, CLIPTextModel) or model.text_encoder.config.hidden_act == "quick_gelu":
        return Family("stable-diffusion-v1", f"sd_v1{suffix}", False, prediction_type)
    architecture = "stable-diffusion-v2-768-v" if is_velocity else "stable-diffusion-v2-512"
    return Family(architecture, f"sd_v2{suffix}", True, prediction_type)


def file_stem(label: str, shift: WeightShift) -> str:
    """Return such as 3-Jackson-Pollock, or red-fox where a user named it; nothing in it leads out of the folder."""
    name = shift.metadata.get("concept", "shift")
    is_own = shift.metadata.get("category") == OWN
    return re.sub(r"\W+", "-", name if is_own else f"{label}-{name}").strip("-") or label


def lora_metadata(model: DiffusionModel, label: str, shift: WeightShift, name: str, is_kohya: bool) -> dict[str, str]:
    """Return what the header of a concept's LoRA says, whose file is called `name`, in kohya's keys or diffusers'."""
    family, concept = family_of(model), shift.metadata.get("concept", label)
    spec = _model_spec(
        model,
        "/".join((family.architecture, "lora")),
        _STABILITY if is_kohya and family.is_xl else _DIFFUSERS,
        f"{concept} erased from {model.config_name}",
        f"A LoRA of rank {shift.rank} that erases {concept} from {model.config_name}, made by {CREATED_BY}.",
    )
    spec["modelspec.usage_hint"] = _STRENGTH
    spec["modelspec.category"] = "Concept erasure"  # and not "Style", where programs list what adds one
    spec["modelspec.tags"] = str(concept)
    kohya = {
        "ss_base_model_version": family.version,
        "ss_network_alpha": str(shift.rank),
        "ss_network_dim": str(shift.rank),
        "ss_output_name": name,
        "ss_sd_model_name": model.config_name,
        "ss_training_comment": f"erases {concept}. {_STRENGTH}",
        "ss_v2": str(family.is_v2),
    }
    if is_kohya:
        kohya["ss_network_module"] = "networks.lora"
    said = {key: value for key, value in (spec | kohya).items() if value or key in _HASHES}
    return {METADATA_KEY: _own_metadata(model, {label: shift}, "LoRA")} | said


def unet_metadata(model: DiffusionModel, shifts: Mapping[str, WeightShift]) -> dict[str, str]:
    """Return what the header of a merged U-Net says."""
    return {METADATA_KEY: _own_metadata(model, shifts, "merged U-Net")}


def checkpoint_metadata(model: DiffusionModel, shifts: Mapping[str, WeightShift]) -> dict[str, str]:
    """Return what the header of a merged checkpoint in CompVis' layout says."""
    concepts = ", ".join(str(shift.metadata.get("concept", label)) for label, shift in shifts.items())
    spec = _model_spec(
        model,
        family_of(model).architecture,
        _STABILITY,
        f"{model.config_name} with {len(shifts)} erased",
        f"{model.config_name}, from which {CREATED_BY} erased: {concepts or 'nothing'}.",
    )
    spec["modelspec.merged_from"] = model.config_name
    return {METADATA_KEY: _own_metadata(model, shifts, "merged checkpoint")} | spec


def _model_spec(
    model: DiffusionModel, architecture: str, implementation: str, title: str, description: str
) -> dict[str, str]:
    """Return ModelSpec's keys, and hashes that `save_with_metadata` fills in; a date would change a repeated export."""
    return {
        "modelspec.sai_model_spec": _SPEC_VERSION,
        "modelspec.architecture": architecture,
        "modelspec.implementation": implementation,
        "modelspec.title": title,
        "modelspec.description": description,
        "modelspec.resolution": f"{model.image_size}x{model.image_size}",
        "modelspec.prediction_type": family_of(model).prediction_type,
        **_HASHES,
    }


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
