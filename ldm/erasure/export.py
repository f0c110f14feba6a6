"""TODO erasure.export."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from diffusers import StableDiffusionPipeline
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from diffusers.utils import convert_state_dict_to_kohya
import pandas as pd
from pathlib import Path
import re
from safetensors.torch import save_file
import torch
from torch import nn
from tqdm import tqdm
from ldm.diffusion.compvis import EMA_PREFIX, convert_to_compvis, load_compvis_state_dict
from ldm.diffusion.edits import replace_parameters
from ldm.diffusion.load import save_pipeline
from ldm.diffusion.model import DiffusionModel
from ldm.diffusion.text_layers import text_layers
from ldm.erasure.leakage import leakage, leakage_after_rounding, leakage_table, truncation_error
from ldm.erasure.merge import merge, merged_weight
from ldm.erasure.shift import DenseShift, SeparableShift, WeightShift
from ldm.io.files import METADATA_FILE, atomic_write_dir, check_metadata, write_json


Weights = dict[str, torch.Tensor]


def merged_and_cast(model: DiffusionModel, weights: Weights, dtype: torch.dtype) -> AbstractContextManager:
    """A scope in which the model holds merged `weights`, and all else rounded to `dtype`: what is merged must be merged before,
    so that nothing is rounded twice. All formats are written within it."""
    model.to(dtype)
    return replace_parameters(model.unet, {name: nn.Parameter(weight, requires_grad=False) for name, weight in weights.items()})


def save_diffusers(model: DiffusionModel, shifts: Mapping[str, WeightShift], folder: Path, dtype: torch.dtype) -> None:
    """A whole model, for `DiffusionPipeline.from_pretrained`."""
    save_pipeline(model, folder)


def save_unet(model: DiffusionModel, shifts: Mapping[str, WeightShift], folder: Path, dtype: torch.dtype) -> None:
    """The U-Net alone, for `UNet2DConditionModel.from_pretrained`, or to load its one file as a state dict."""
    model.unet.save_pretrained(folder, safe_serialization=True)


def save_compvis(model: DiffusionModel, shifts: Mapping[str, WeightShift], folder: Path, dtype: torch.dtype) -> None:
    """A checkpoint in CompVis' layout: the original one with only the changed weights changed, and of the same kind of file;
    of a diffusers folder, a .safetensors. A checkpoint's moving averages (EMA) are changed as its weights are.

    Raises ValueError for a folder whose text encoder CompVis' version 1 does not have.
    """
    if model.checkpoint:
        tensors = load_compvis_state_dict(model.checkpoint)
        names = convert_ldm_unet_checkpoint({name: name for name in tensors}, model.unet.config)  # by diffusers' own rules
        for changed in dict.fromkeys(name for shift in shifts.values() for name in shift.names):
            averaged = EMA_PREFIX + names[changed].removeprefix("model.").replace(".", "")
            for name in (names[changed], averaged):
                if name in tensors:
                    tensors[name] = merged_weight(tensors[name], changed, list(shifts.values()))
        if dtype != torch.float32:
            tensors = {name: value.to(dtype) if value.is_floating_point() else value for name, value in tensors.items()}
    else:
        encoder = model.text_encoder
        if type(model.pipeline) is not StableDiffusionPipeline or encoder.config.hidden_act != "quick_gelu":
            raise ValueError(f"{model.name} is not laid out as Stable Diffusion v1, whose checkpoint alone can be made from a folder: "
                             "pass its original checkpoint, or choose another --format")
        tensors = convert_to_compvis(model.unet.state_dict(), model.vae.state_dict(), encoder.state_dict())
    path = folder / f"model{model.checkpoint.suffix if model.checkpoint else '.safetensors'}"
    if path.suffix == ".safetensors":
        save_file({name: value.cpu().contiguous() for name, value in tensors.items()}, path, metadata={"format": "pt"})
    else:
        torch.save({"state_dict": tensors}, path)


def save_lora(model: DiffusionModel, shifts: Mapping[str, WeightShift], folder: Path, dtype: torch.dtype) -> None:
    """One LoRA a concept, for `load_lora_weights` of a diffusers pipeline: at strength 1 the concept is erased."""
    for label, shift in shifts.items():
        type(model.pipeline).save_lora_weights(folder, unet_lora_layers=_lora_tensors(shift, dtype), weight_name=_file_name(label, shift))


def save_kohya(model: DiffusionModel, shifts: Mapping[str, WeightShift], folder: Path, dtype: torch.dtype) -> None:
    """Likewise, with the keys that ComfyUI and A1111 read; alpha is the rank, so that strength 1 is the erasure."""
    for label, shift in shifts.items():
        layers = {f"unet.{name}": value for name, value in _lora_tensors(shift, dtype).items()}
        made = {name: value.to(dtype).contiguous() for name, value in convert_state_dict_to_kohya(layers).items()}
        save_file(made, folder / _file_name(label, shift), metadata={"format": "pt"})


def _lora_tensors(shift: WeightShift, dtype: torch.dtype) -> Weights:
    if not isinstance(shift, SeparableShift):
        raise ValueError(f"{shift.path} changes whole weights, which no LoRA holds: choose --format compvis, diffusers or unet")
    made = {}
    for name in shift.names:
        layer = name.removesuffix(".weight")
        up, down = shift.lora_factors(layer)
        for part, factor in (("lora_A", down), ("lora_B", up)):
            made[f"{layer}.{part}.weight"] = factor.to(dtype).clone(memory_format=torch.contiguous_format)
    return made


def _file_name(label: str, shift: WeightShift) -> str:
    """Such as 3-Jackson-Pollock.safetensors; nothing in a shift's recipe leads out of the folder."""
    return re.sub(r"\W+", "-", f"{label}-{shift.metadata.get('concept', 'shift')}") + ".safetensors"


def truncate_shifts(model: DiffusionModel, shifts: Mapping[str, WeightShift], rank: int | str, share: float,
        dtype: torch.dtype) -> tuple[dict[str, WeightShift], list[dict]]:
    """The shifts at `rank`, or at the lowest with `share` of their effect on the concept's own prompts ("auto"), and a row
    about each: its rank, the share that it lost (`lost`), the most that it moves what it protects, and its size as a LoRA
    in `dtype`. Raises ValueError for shifts that have no rank, or a share outside (0, 1]."""
    if not 0 < share <= 1:
        raise ValueError(f"--share {share} is outside (0, 1]: give a part of the effect, such as 0.85")
    made, rows = {}, []
    for label, shift in shifts.items():
        if not isinstance(shift, SeparableShift):
            raise ValueError(f"{shift.path} changes whole weights and has no rank: leave --rank out, and choose --format compvis, "
                             "diffusers or unet")
        recipe = shift.metadata
        said = [recipe.get("prompt"), *recipe.get("captions", [None]), *recipe.get("protected", [None])]
        if not all(isinstance(prompt, str) for prompt in said):
            raise ValueError(f"{shift.path} does not say what it erases and protects: make it again with {recipe.get('made_by')}")
        own = model.tokens(model.encode_prompt([recipe["prompt"], *recipe["captions"]])).flatten(0, 1)
        protected = model.seen(recipe["protected"])
        most = len(shift.directions)
        for k in range(1, most + 1) if rank == "auto" else [min(rank, most)]:
            few = shift.cut(k)
            missing = truncation_error(shift, few, own)
            if missing <= 1 - share:
                break
        made[label] = few
        tensors = _lora_tensors(few, dtype)
        rounded = DenseShift({name: tensors[f"{layer}.lora_B.weight"].double() @ tensors[f"{layer}.lora_A.weight"].double()
                              for name in few.names for layer in [name.removesuffix(".weight")]})
        rows.append({"concept": recipe["concept"], "rank": len(few.directions), "of": most, "effect lost": missing,
                     "moves protected": max(row["leak"] for row in leakage(text_layers(model.unet), {"": rounded}, protected)),
                     "KB": sum(value.numel() * value.element_size() for value in tensors.values()) / 1000})
    return made, rows


FORMATS: dict[str, Callable[[DiffusionModel, Mapping[str, WeightShift], Path, torch.dtype], None]] = {
    "compvis": save_compvis, "lora": save_lora, "kohya": save_kohya, "unet": save_unet, "diffusers": save_diffusers}


LORA_FORMATS = ("lora", "kohya")


def export(model: DiffusionModel, shifts: Mapping[str, WeightShift], place: Path, formats: Sequence[str], dtype: torch.dtype,
           rank: int | str | None, share: float, prompts: Sequence[str],
           made_by: str) -> tuple[pd.DataFrame, list[dict], list[Path]]:
    """Write what `formats` name: each into the folder `place`, or `place`-FORMAT but for diffusers. What is there already from
    the same shifts stays. Of the model's weights nothing is left but rounded ones.

    Returns how far each shift moves `prompts` (`leak_table`) and all together after rounding, the rows of `cut`, and the
    folders. `rank` and `share` as in `cut`; a `rank` of None cuts LoRAs alone.
    """
    report, few = [], shifts
    if rank or set(formats) & set(LORA_FORMATS):
        few, report = truncate_shifts(model, shifts, rank or "auto", share, dtype)
    layers, seen = text_layers(model.unet), model.seen(prompts)
    whole = few if rank else shifts
    table = leakage_table(layers, whole, seen)
    merged = merge(model.unet, list(whole.values()), dtype)
    table[f"all, in {str(dtype).removeprefix('torch.')}"] = pd.Series(leakage_after_rounding(layers, merged, seen))
    targets = []
    for kind in tqdm(formats, desc="write", unit="format"):
        used = few if kind in LORA_FORMATS else whole
        target = place if kind == "diffusers" else place.with_name(f"{place.name}-{kind}")
        recipe = {"made_by": made_by, "base": model.base, "base_digest": model.digest,
                  "merged": {label: shift.metadata for label, shift in used.items()}}
        if dtype != torch.float32:
            recipe["dtype"] = str(dtype)
        check_metadata(target, recipe)
        if not target.exists():
            with atomic_write_dir(target) as partial, merged_and_cast(model, merged, dtype):
                FORMATS[kind](model, used, partial, dtype)
                write_json(partial / METADATA_FILE, recipe)
        targets.append(target)
    return table, report, targets
