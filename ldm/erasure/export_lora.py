"""Shifts as LoRAs, one a concept: as diffusers has them, and in the layout of kohya's sd-scripts."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import convert_state_dict_to_kohya

from ldm.diffusion.model import DiffusionModel
from ldm.erasure.export_metadata import file_stem, lora_metadata, save_with_metadata
from ldm.erasure.shift import SeparableShift, WeightShift
from ldm.io.tensors import check_finite

Weights = dict[str, torch.Tensor]


def save_lora(model: DiffusionModel, shifts: Mapping[str, WeightShift], folder: Path, dtype: torch.dtype) -> None:
    """Write one LoRA a concept, for `load_lora_weights` of a diffusers pipeline: strength 1 erases the concept."""
    pipeline: Any = type(model.pipeline)
    if not _takes_loras(pipeline):
        raise ValueError(f"{pipeline.__name__} of diffusers takes no LoRA: choose `format` diffusers, unet or shift")
    for label, shift in shifts.items():
        tensors = lora_tensors(shift, dtype)
        save = partial(_save_lora_file, metadata=lora_metadata(model, label, shift, tensors, is_kohya=False))
        layers = {f"{model.adapter.denoiser}_lora_layers": tensors}
        file_name = f"{file_stem(label, shift)}.safetensors"
        pipeline.save_lora_weights(folder, **layers, weight_name=file_name, save_function=save)


def _save_lora_file(tensors: Weights, path: str, metadata: Mapping[str, str]) -> None:
    """Write a LoRA's file as diffusers has it written: `tensors` have its keys already."""
    save_with_metadata(Path(path), tensors, metadata)


def save_kohya(model: DiffusionModel, shifts: Mapping[str, WeightShift], folder: Path, dtype: torch.dtype) -> None:
    """Write one LoRA a concept in the layout of kohya's sd-scripts; alpha is the rank, so strength 1 is the erasure.

    ComfyUI reads all of them, and A1111 those of U-Nets. diffusers' `load_lora_weights` reads those of U-Nets and of
    FLUX.2; of FLUX.1 it leaves these layers out with no more than a warning (0.42), and of others it converts none.
    """
    names = kohya_names(model, shifts)
    for label, shift in shifts.items():
        layers: Weights = {}
        for key, value in lora_tensors(shift, dtype).items():
            layer, _, part = key.rpartition(".lora_")
            layers[f"unet.{names[layer]}.lora_{part}"] = value
        tensors = {name: value.to(dtype) for name, value in convert_state_dict_to_kohya(layers).items()}
        metadata = lora_metadata(model, label, shift, layers, is_kohya=True)
        save_with_metadata(folder / f"{file_stem(label, shift)}.safetensors", tensors, metadata)


def kohya_names(model: DiffusionModel, shifts: Mapping[str, WeightShift]) -> dict[str, str]:
    """Return what kohya's LoRAs call the layers that shifts change; ValueError where one has no such name."""
    layers = {name.removesuffix(".weight") for shift in shifts.values() for name in shift.parameter_names}
    names = {layer: model.adapter.kohya_name(layer) for layer in sorted(layers)}
    unnamed = ", ".join(layer for layer, name in names.items() if not name)
    if unnamed:
        pipeline = type(model.pipeline)
        others = "lora" if _takes_loras(pipeline) else "diffusers, unet or shift"
        raise ValueError(f"kohya's LoRAs have no name for {unnamed} of a {pipeline.__name__}: choose `format` {others}")
    return names


def _takes_loras(pipeline: type) -> bool:
    return hasattr(pipeline, "save_lora_weights")


def lora_tensors(shift: WeightShift, dtype: torch.dtype) -> Weights:
    """Return a shift as a LoRA in peft's keys, `LAYER.lora_A.weight` (r, in) and `LAYER.lora_B.weight` (out, r).

    Raises ValueError for one that changes whole weights, and for what overflows in `dtype`.
    """
    if not isinstance(shift, SeparableShift):
        raise ValueError(
            f"{shift.path} changes whole weights, which no LoRA holds: choose `format` compvis, diffusers or unet"
        )
    tensors = {}
    for name in shift.parameter_names:
        layer = name.removesuffix(".weight")
        up, down = shift.lora_factors(layer)
        if not len(down):
            continue  # none of its directions lies in what the layer sees
        for part, factor in (("lora_A", down), ("lora_B", up)):
            tensors[f"{layer}.{part}.weight"] = factor.to(dtype).clone(memory_format=torch.contiguous_format)
    check_finite(tensors, f"the LoRA of {shift.path}")
    return tensors
