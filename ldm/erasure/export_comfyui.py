"""Shifts' gates as a custom node of ComfyUI: a folder with the node, the gates that it reads, and how to use it."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from ldm.diffusion.family import PENULTIMATE
from ldm.diffusion.model import DiffusionModel
from ldm.erasure.comfyui_node import GATES_FILE
from ldm.erasure.gated_edit import GatedEdit, GatedPrompts
from ldm.erasure.shift import WeightShift
from ldm.io.files import write_text
from ldm.io.tensors import save_tensors

GATES_FILE_TYPE = "gates for ComfyUI"
_TEMPLATE = Path(__file__).with_stem("comfyui_node")
_README = """SRS-ME erase concepts: a custom node for ComfyUI

It leaves concepts out of the prompts that say them. Every other prompt, and so its image, stays as it is.

1. Copy this folder into ComfyUI's folder custom_nodes, and start ComfyUI again.
2. Load {base_model} itself, with no weights merged and no LoRA of these concepts.
3. Put the node between that and each CLIP Text Encode, the negative one too.
4. Write all into concepts, or names separated by commas: {names}.

The gates know the text encoder of {base_model} as it is: of another one, or with a LoRA that changes it, they may not
fire. A prompt of several sections of {tokens} tokens is looked at section by section. Restoring a concept is leaving
its name out; erasing none is bypassing the node.
"""


def check_comfyui(model: DiffusionModel, shifts: Mapping[str, WeightShift]) -> None:
    """Raise ValueError unless ComfyUI can have the model's text encoders, and each shift has a gate that fits them.

    T5 takes padding for tokens, of which ComfyUI's has at least 256 in FLUX.1 and 77 in Stable Diffusion 3, diffusers'
    always 512 and 256: its hidden states there are not those that gates are fitted on.
    """
    if not model.adapter.comfyui_encoders(model.pipeline):
        raise ValueError(
            f"{model.name} is a {type(model.pipeline).__name__}, and ComfyUI's node with gates reads the text encoders "
            "of Stable Diffusion 1 to XL alone: choose another `format`, such as shift, or another model"
        )
    for encoder in model.text_encoders.values():
        if not isinstance(encoder, (CLIPTextModel, CLIPTextModelWithProjection)):
            raise ValueError(
                f"{model.name} reads prompts by a {type(encoder).__name__}, and ComfyUI has none but CLIP for such a "
                "model: choose another `format`, such as shift, or another model"
            )
    for label, shift in shifts.items():
        if shift.gated is None:
            raise ValueError(
                f"the shift of {_name(label, shift)} has no gate, and comfyui is a format of gates alone: make it "
                "again by SRS-ME with `gate`, leave it out, or choose another `format`"
            )
        shift.gated.check(model.text_encoders, model.places, shift.path)


def save_comfyui(model: DiffusionModel, shifts: Mapping[str, WeightShift], folder: Path, dtype: torch.dtype) -> None:
    """Write the node, and the gates and maps as shifts' files have them, whatever `dtype` is."""
    encoders = model.adapter.comfyui_encoders(model.pipeline)
    tensors: dict[str, torch.Tensor] = {}
    concepts: list[dict[str, Any]] = []
    for number, (label, edit) in enumerate(_edits(shifts).items()):
        renamed = replace(
            edit,
            gates={encoders[name]: gate for name, gate in edit.gates.items()},
            layers={encoders[name]: layer for name, layer in edit.layers.items()},
        )
        tensors |= {f"{number}.{name}": tensor for name, tensor in renamed.tensors().items()}
        said = {key: renamed.metadata[key] for key in ("layers", "penalties")}
        digest = shifts[label].content_digest
        concepts.append({"name": _name(label, shifts[label]), "label": label, "content_digest": digest, **said})
    kinds = {encoders[source.name]: source.kind for source in model.adapter.sources(model.pipeline)}
    configs = {encoders[name]: encoder.config for name, encoder in model.text_encoders.items()}
    metadata = {
        "base_model": model.config_name,
        "base_digest": model.digest,
        "encoders": list(configs),
        "widths": {name: config.hidden_size for name, config in configs.items()},
        "output_layers": {
            name: config.num_hidden_layers - (2 if kinds[name] == PENULTIMATE else 1)
            for name, config in configs.items()
        },
        "concepts": concepts,
    }
    save_tensors(folder / GATES_FILE, tensors, GATES_FILE_TYPE, metadata)
    shutil.copyfile(_TEMPLATE, folder / _TEMPLATE.with_stem("__init__").name)
    names = ", ".join(concept["name"] for concept in concepts)
    tokens = model.tokenizers[0].model_max_length
    write_text(folder / "README.txt", _README.format(base_model=model.config_name, names=names, tokens=tokens))


def gates_table(model: DiffusionModel, shifts: Mapping[str, WeightShift], prompts: Sequence[str]) -> pd.DataFrame:
    """Return for each prompt (a row) which gates fire, by the labels of shifts, and how far it is above the nearest."""
    gates = GatedPrompts(_edits(shifts), model.places)
    rows: list[dict[str, Any]] = []
    for prompt in prompts:
        states = model.encode_with_states([prompt], gates.layers)[1]
        highest = max(edit.margins(states).item() for edit in gates.edits.values())
        rows.append({"gates that fire": ", ".join(gates.fired(states)[0]) or "none", "margin": highest})
    return pd.DataFrame(rows, pd.Index(prompts, name="prompt"))


def _edits(shifts: Mapping[str, WeightShift]) -> dict[str, GatedEdit]:
    return {label: shift.gated for label, shift in shifts.items() if shift.gated is not None}


def _name(label: str, shift: WeightShift) -> str:
    return str(shift.metadata.get("concept", label))
