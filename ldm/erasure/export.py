"""Shifts as what other programs read: merged weights in three layouts, one LoRA a concept in two, gates for ComfyUI."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from diffusers import StableDiffusionPipeline
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME
from torch import nn
from tqdm import tqdm

from ldm.config.methods import (
    CUT_FORMATS,
    FORMATS,
    GATED_FORMATS,
    LINEAR_FORMATS,
    SHARED_FORMATS,
    ExportConfig,
)
from ldm.config.models import load_model_config, save_settings
from ldm.diffusion.compvis import (
    EMA_PREFIX,
    convert_to_compvis,
    is_safetensors,
    is_weight,
    load_compvis_state_dict,
)
from ldm.diffusion.edits import replace_parameters
from ldm.diffusion.family_stable_diffusion import STABILITY
from ldm.diffusion.load import save_pipeline
from ldm.diffusion.model import DiffusionModel
from ldm.erasure.effect import notify_of_weak
from ldm.erasure.export_comfyui import check_comfyui, gates_table, save_comfyui
from ldm.erasure.export_lora import kohya_names, lora_tensors, save_kohya, save_lora
from ldm.erasure.export_metadata import file_stem, merged_metadata, save_with_metadata
from ldm.erasure.export_shift import as_written, save_shifts
from ldm.erasure.leakage import (
    EmbeddingCache,
    each_stream,
    leakage,
    leakage_after_rounding,
    leakage_table,
    truncation_error,
)
from ldm.erasure.merge import SummedShifts, check_unedited, merge
from ldm.erasure.shift import DenseShift, SeparableShift, WeightShift
from ldm.io.files import SETTINGS_FILE, atomic_write_dir, is_written, write_dir_metadata
from ldm.io.tensors import CREATED_BY, check_finite, named_writes

Weights = dict[str, torch.Tensor]
_OF_WEIGHTS = LINEAR_FORMATS + SHARED_FORMATS


@dataclass(frozen=True)
class Export:
    """What `export` wrote, and what it measured.

    `leakage` is the table of each shift's leakage on each prompt, and of all together after rounding, or of the gates
    that fire where these alone were written; `truncated` has a row about each shift that was cut to a rank; `targets`
    are the folders.
    """

    leakage: pd.DataFrame
    truncated: list[dict[str, Any]]
    targets: list[Path]


def export(
    model: DiffusionModel,
    shifts: Mapping[str, WeightShift],
    output_dir: Path,
    config: ExportConfig,
    prompts: Sequence[str],
) -> Export:
    """Write what `config.formats` names: each into the folder `output_dir`, or `output_dir`-FORMAT but for diffusers.

    What is there already from the same shifts stays. Of the model's weights only rounded ones are left. Each shift's
    leakage on `prompts` is reported. LoRAs are always cut to a rank, other weights only if `config.rank` is set, gates
    never. A whole model in diffusers' layout carries the settings of `model`, but a settings file that is there stays.
    What is refused is refused before anything is written. Raises ValueError for a model of which an earlier export left
    rounded weights, for merged weights of one that is not held in float32, and for one that shifts act on now.
    """
    check_unedited(model)
    model.check_files()
    if model.is_rounded:
        raise ValueError(f"an earlier export rounded the weights of {model.name}: load the model again")
    merged_formats = set(config.formats) & set(LINEAR_FORMATS) - set(CUT_FORMATS)
    if model.checkpoint:
        merged_formats -= {"compvis"}  # which is merged into the checkpoint itself
    if model.dtype not in (torch.float32, model.read_dtype) and merged_formats:
        raise ValueError(
            f"the weights of {model.name} are held in {model.dtype}, by which those of "
            f"{', '.join(sorted(merged_formats))} would be rounded: load the model with `unet_dtype` float32"
        )
    if not shifts or not prompts:
        raise ValueError("an export needs a shift, and a prompt to report the leakage on: give one of each")
    known: dict[str, str] = {}
    for label, shift in shifts.items():
        if {"base_digest", "text_digest"} & shift.metadata.keys():
            shift.check(model)
        if shift.content_digest and known.setdefault(shift.content_digest, label) != label:
            raise ValueError(
                f"{shift.path} is there twice, as {known[shift.content_digest]} and as {label}: give it once"
            )
        if shift.is_gate_alone and set(config.formats) & set(LINEAR_FORMATS):
            raise ValueError(
                f"the shift of {shift.metadata.get('concept', label)} is a gate alone, which no weights hold: choose "
                f"`format` {' or '.join(SHARED_FORMATS + GATED_FORMATS)}, or make it again with `mode` closed_form"
            )
    edit = load_model_config(model).edit  # which refuses settings that could not be read from an export
    for form, names in (("linear", _OF_WEIGHTS), ("gated", GATED_FORMATS)):
        if set(names) & set(config.formats):
            notify_of_weak(
                shifts,
                edit.with_changes(form=form),
                "what is exported says it still: erase it anew with other settings",
            )
    layers, dtype = model.text_layers, getattr(torch, config.save_dtype)
    report: list[dict[str, Any]] = []
    shifts = {label: shift.on(layers) for label, shift in shifts.items()}
    truncated = dict(shifts)
    if set(config.formats) & set(GATED_FORMATS):
        check_comfyui(model, shifts)
    if set(config.formats) & set(CUT_FORMATS):
        _check_file_names(shifts)
    gates_alone = all(shift.is_gate_alone for shift in shifts.values())
    is_linear = bool(set(config.formats) & set(_OF_WEIGHTS)) and not gates_alone
    if (config.rank and is_linear) or set(config.formats) & set(CUT_FORMATS):
        truncated, report = truncate_shifts(model, shifts, config)
    if "kohya" in config.formats:
        kohya_names(model, truncated)
    merged_shifts = truncated if config.rank else dict(shifts)
    merged: Weights = {}
    if is_linear:
        embeds = model.embed_prompts(prompts)
        own = (str(shift.metadata.get("prompt")) for shift in merged_shifts.values())
        embeds |= each_stream(layers, embeds, [prompt for prompt in own if prompt in embeds])
        table = leakage_table(layers, merged_shifts, embeds)
        merged = merge(model.denoiser, list(merged_shifts.values()), dtype)
        check_finite(merged, f"{output_dir}")
        table[f"all, in {config.save_dtype}"] = pd.Series(leakage_after_rounding(layers, merged, embeds))
    else:
        table = gates_table(model, shifts, prompts)
    targets: list[Path] = []
    pending: list[tuple[str, Path, Mapping[str, WeightShift], dict[str, Any]]] = []
    ordered = [name for name in FORMATS if name in config.formats]
    for name in ordered:
        target = output_dir if name == "diffusers" else output_dir.with_name(f"{output_dir.name}-{name}")
        used = truncated if name in CUT_FORMATS else merged_shifts
        if name in GATED_FORMATS:
            used = dict(shifts)
        metadata = {
            "created_by": CREATED_BY,
            "base_model": model.config_name,
            "base_digest": model.digest,
            "merged": {label: shift.provenance for label, shift in used.items()},
        }
        if dtype != torch.float32 and name in _OF_WEIGHTS:
            metadata["dtype"] = str(dtype)
        if not is_written(target, metadata, model.digests):
            pending.append((name, target, used, metadata))
        targets.append(target)
    of_base = (*CUT_FORMATS, *GATED_FORMATS)  # which measure what shifts do, and come first
    with ExitStack() as merging:
        pending.sort(key=lambda each: each[0] not in of_base)
        first = next((name for name, *_ in pending if name not in of_base), None)
        if first:
            model.check_fits(dtype)
        for name, target, used, metadata in tqdm(pending, desc="write", unit="format"):
            if name == first:
                merging.enter_context(merged_and_cast(model, merged, dtype))
            with atomic_write_dir(target) as folder:
                _WRITERS[name](model, used, folder, dtype)
                if (target / SETTINGS_FILE).is_file():  # which the user may have changed
                    shutil.copyfile(target / SETTINGS_FILE, folder / SETTINGS_FILE)
                elif name == "diffusers":
                    save_settings(model, folder)
                model.check_files()
                write_dir_metadata(folder, metadata)
    return Export(table, report, targets)


def merged_and_cast(model: DiffusionModel, weights: Weights, dtype: torch.dtype) -> AbstractContextManager[None]:
    """Round the model to `dtype`, which stays so, and let it hold merged `weights` while the block runs.

    What is merged must be merged before, so that nothing is rounded twice.
    """
    model.to(dtype)
    return replace_parameters(
        model.denoiser, {name: nn.Parameter(weight, requires_grad=False) for name, weight in weights.items()}
    )


def save_diffusers(model: DiffusionModel, shifts: Mapping[str, WeightShift], folder: Path, dtype: torch.dtype) -> None:
    """Write a whole model, for `DiffusionPipeline.from_pretrained`."""
    save_pipeline(model, folder)


def save_unet(model: DiffusionModel, shifts: Mapping[str, WeightShift], folder: Path, dtype: torch.dtype) -> None:
    """Write the denoiser alone, for `from_pretrained` of its class, or to load its one file as a state dict."""
    model.denoiser.save_config(folder)
    metadata = merged_metadata(model, shifts, "merged denoiser")
    save_with_metadata(folder / SAFETENSORS_WEIGHTS_NAME, model.denoiser.state_dict(), metadata)


def save_compvis(model: DiffusionModel, shifts: Mapping[str, WeightShift], folder: Path, dtype: torch.dtype) -> None:
    """Write a checkpoint in CompVis' layout: the original, in its kind of file, with only the changed weights changed.

    Of a diffusers folder it is a .ckpt, which CompVis' own code reads, and the same as a .safetensors. A checkpoint's
    moving averages (EMA) are changed as its weights are. Of what is no weight nothing is rounded. Raises ValueError for
    a folder of anything but a Stable Diffusion v1.
    """
    if model.checkpoint:
        tensors = _merged_checkpoint(model, model.checkpoint, list(shifts.values()))
        if dtype != torch.float32:
            tensors = {name: value.to(dtype) if is_weight(name, value) else value for name, value in tensors.items()}
        paths = [folder / f"model{'.safetensors' if is_safetensors(model.checkpoint) else '.ckpt'}"]
    else:
        tensors = _converted_folder(model)
        paths = [folder / "model.ckpt", folder / "model.safetensors"]
    tensors = {name: value.cpu().contiguous() for name, value in tensors.items()}
    check_finite(tensors, f"{model.name} in CompVis' layout")
    for path in paths:
        if path.suffix == ".safetensors":
            save_with_metadata(path, tensors, merged_metadata(model, shifts, "merged checkpoint", STABILITY))
        else:
            with named_writes(path):
                torch.save({"state_dict": tensors}, path)


def _converted_folder(model: DiffusionModel) -> Weights:
    """Return the tensors of a diffusers folder's model in CompVis' layout."""
    encoder = model.text_encoder
    if type(model.pipeline) is not StableDiffusionPipeline or encoder.config.hidden_act != "quick_gelu":
        raise ValueError(
            f"{model.name} is no Stable Diffusion v1, and checkpoints in CompVis' layout are written of that alone: "
            "choose `format` diffusers, unet or shift"
        )
    try:
        return convert_to_compvis(model.denoiser.state_dict(), model.vae.state_dict(), encoder.state_dict())
    except ValueError as error:
        raise ValueError(f"{model.name} is not written as compvis: {error}") from error


def _merged_checkpoint(model: DiffusionModel, checkpoint: Path, shifts: Sequence[WeightShift]) -> Weights:
    """Return the tensors of the model's checkpoint with the shifts added to its weights and their moving averages."""
    tensors = load_compvis_state_dict(checkpoint)
    identity: Any = {name: name for name in tensors}
    names: Any = convert_ldm_unet_checkpoint(identity, model.denoiser.config)  # by diffusers' own rules
    summed = SummedShifts(shifts, model.text_layers)
    for parameter in summed.parameter_names:
        averaged = EMA_PREFIX + names[parameter].removeprefix("model.").replace(".", "")
        for name in (names[parameter], averaged):
            if name in tensors:
                tensors[name] = summed.merged(tensors[name], parameter)
    return tensors


_Writer = Callable[[DiffusionModel, Mapping[str, WeightShift], Path, torch.dtype], None]
_WRITERS: dict[str, _Writer] = {
    "compvis": save_compvis,
    "lora": save_lora,
    "kohya": save_kohya,
    "shift": save_shifts,
    "unet": save_unet,
    "diffusers": save_diffusers,
    "comfyui": save_comfyui,
}


def _check_file_names(shifts: Mapping[str, WeightShift]) -> None:
    """Raise ValueError for two shifts whose LoRAs would be one file."""
    labels: dict[str, str] = {}
    for label, shift in shifts.items():
        name = file_stem(label, shift).lower()  # as a file system may compare
        if name in labels:
            raise ValueError(f"`shifts` {labels[name]} and {label} would both be {name}.safetensors: rename one")
        labels[name] = label


def truncate_shifts(
    model: DiffusionModel, shifts: Mapping[str, WeightShift], config: ExportConfig
) -> tuple[dict[str, SeparableShift], list[dict[str, Any]]]:
    """Return the shifts at `config.rank`, or the lowest with `config.effect_fraction` of their effect, and a row each.

    The effect is that on the concept's own prompts. A row has the rank, the `formats` that are cut to it (the
    others keep all directions), the effect that is missing (`truncation_error`), the largest leakage on what the shift
    protects, and the size of its tensors, as a LoRA where it is one. Raises ValueError for shifts that have no rank.
    """
    cut = [name for name in _OF_WEIGHTS if name in config.formats and (config.rank or name in CUT_FORMATS)]
    dtype = getattr(torch, config.save_dtype)
    truncated: dict[str, SeparableShift] = {}
    rows = []
    for label, shift in shifts.items():
        if not isinstance(shift, SeparableShift):
            raise ValueError(
                f"{shift.path} changes whole weights and has no rank: leave `rank` out, and choose `format` "
                "compvis, diffusers or unet"
            )
        metadata = shift.metadata
        known = [metadata.get(name) for name in ("concept", "prompt", "captions", "protected")]
        if not all(known):
            raise ValueError(f"{shift.path} does not say what it erases and protects: make it again")
        own_prompts = [metadata["prompt"], *metadata["captions"]]
        own_embeds = model.layer_inputs(model.encode_prompt(own_prompts)).flatten(0, 1)
        protected = model.embed_prompts(metadata["protected"])
        truncated_shift, error = _truncate(shift, own_embeds, config)
        truncated[label] = truncated_shift
        written, size = _as_cut(truncated_shift, dtype, cut)
        if written.gated and written.is_gate_alone:
            changes = EmbeddingCache(model).gate_leakage(written.gated, protected)
        else:
            changes = {row["prompt"]: row["leakage"] for row in leakage(model.text_layers, {"": written}, protected)}
        rows.append(
            {
                "concept": metadata["concept"],
                "rank": truncated_shift.rank,
                "of": shift.rank,
                "formats": ", ".join(cut),
                "truncation_error": error,
                "max_leakage_protected": max(changes.values()),
                "KB": size / 1000,
            }
        )
    return truncated, rows


def _as_cut(shift: SeparableShift, dtype: torch.dtype, formats: Sequence[str]) -> tuple[WeightShift, int]:
    """Return a shift as files of the formats have it, and the bytes of its tensors: those of a LoRA, if one is."""
    if "shift" in formats:
        written = as_written(shift, dtype)
        if not {"lora", "kohya"} & set(formats):
            gate = written.gated.tensors(dtype) if written.gated else {}
            weights = written.tensors(dtype, shift.metadata.get("streams", {}))
            return written, sum(value.nbytes for value in (weights | gate).values())
    tensors, deltas = lora_tensors(shift, dtype), {}
    for name in shift.parameter_names:
        layer = name.removesuffix(".weight")
        up, down = (tensors[f"{layer}.{part}.weight"].double() for part in ("lora_B", "lora_A"))
        deltas[name] = up @ down
    return DenseShift(deltas), sum(value.nbytes for value in tensors.values())


def _truncate(shift: SeparableShift, own_embeds: torch.Tensor, config: ExportConfig) -> tuple[SeparableShift, float]:
    """Return the shift at the config's rank (None or auto: the lowest with enough effect), and the missing effect."""
    ranks = [min(config.rank, shift.rank)] if isinstance(config.rank, int) else range(1, shift.rank + 1)
    truncated, error = shift, 0.0
    for rank in ranks if shift.rank else ():
        truncated = shift.truncate(rank)
        error = truncation_error(shift, truncated, own_embeds)
        if error <= 1 - config.effect_fraction:
            break
    return truncated, error
