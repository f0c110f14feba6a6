"""How much memory an SRS-ME erasure will take, told from a model's configs alone: nothing is loaded or computed."""

from __future__ import annotations

import itertools
import math
import os
import weakref
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ldm.diffusion.components import UnusableModelError
from ldm.diffusion.families import FAMILIES
from ldm.diffusion.hollow import hollow_pipeline
from ldm.diffusion.load import silence_hf_logging
from ldm.diffusion.text_layers import TextLayers, text_layers
from ldm.diffusion.text_model import split_streams
from ldm.erasure.losses import SRSMELoss
from ldm.erasure.shift import SeparableShift

GIB = 2**30
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}  # and float16 as bfloat16
_LIBRARIES, _CONTEXT = 1.2, 0.6  # GiB that Python and its libraries take for themselves, and what CUDA takes on a GPU


class _AllocationCounter(TorchDispatchMode):
    """While the block runs, count the bytes of tensors made in it, in whole allocator blocks; `peak` is the maximum."""

    def __init__(self, block: int):
        super().__init__()
        self.block, self.now, self.peak = block, 0, 0
        self.known: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.known.update(
            _storages((args, kwargs))
        )  # what comes in was there before; views and results in place share it
        result = func(*args, **(kwargs or {}))
        for storage in _storages(result):
            if storage not in self.known:
                self.known.add(storage)
                size = -(-storage.nbytes() // self.block) * self.block
                self._count(size)
                weakref.finalize(storage, self._count, -size)
        self.peak = max(self.peak, self.now)
        return result

    def _count(self, size: int) -> None:
        self.now += size


def _storages(tree: object) -> list[torch.UntypedStorage]:
    return [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def training_step_memory(pipe: Any, batch_size: int, directions: int, checkpointing: bool, block: int) -> int:
    """Return the bytes beside the frozen weights that `SRSMELoss` and Adam hold at the peak of an iteration.

    `pipe` is a `hollow_pipeline`, its denoiser in the dtype asked for. The loss itself runs, and back, on fake tensors,
    which have shapes but no data; attention is fused. What an allocator of `block` bytes cannot use in between is not
    known.
    """
    family = FAMILIES[type(pipe).__name__]
    denoiser: Any = getattr(pipe, family.denoiser)
    host, side = torch.get_default_device(), family.image_size(pipe)
    width, pooled_width = family.text_dims(denoiser.config)

    def predict_noise(latents: torch.Tensor, timestep: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        given = split_streams(rows.to(denoiser.dtype), pooled_width)
        return family.predict(denoiser, latents, timestep, given, side).float()

    model: Any = SimpleNamespace(device=host, denoiser=denoiser, predict_noise=predict_noise)
    layers = text_layers(denoiser)
    rows = family.num_tokens(pipe) + bool(pooled_width)
    with FakeTensorMode(allow_non_fake_inputs=True):
        denoiser.to_empty(device=host)
        with _AllocationCounter(block) as counter:
            embeds = torch.empty(1, rows, width + pooled_width)
            latents = torch.empty(batch_size, *family.latent_shape(pipe, side), dtype=denoiser.dtype)
            shift = SeparableShift.zeros(layers, torch.empty(directions, layers.width), 1.0)
            loss = SRSMELoss(model, shift, embeds, embeds, 1.0)
            loss.checkpointing = checkpointing
            moments = [torch.zeros_like(weight) for weight in itertools.chain(*[loss.parameters()] * 2)]  # Adam's two
            loss(latents, torch.empty(batch_size, dtype=torch.long)).loss.backward()
            del moments
    return counter.peak


def _is_gpu(device: torch.device) -> bool:
    return device.type != torch.get_default_device().type


def total_memory(device: torch.device) -> int:
    """Return the bytes that the device has in all."""
    if _is_gpu(device):
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def estimate_memory(folder: Path, device: torch.device, batch_size: int, max_directions: int | None) -> pd.DataFrame:
    """Return the peak memory in GiB of an erasure that is learnt, by dtype and gradient checkpointing, and of a merge.

    The most exact and fastest is first, and `choice` marks the first that fits into nine tenths of the device's memory.
    `folder` has the configs of the model's parts. `max_directions` is the most that a shift has (None: as many as the
    prompts are wide). Weights are the denoiser's, and where the device is not a GPU the other parts' too, which cannot
    leave it; there a U-Net is loaded in float32, which counts as well. A merge is one on the CPU into the dtype of the
    files: of a transformer it maps the weights from these, and holds what it changes alone. An iteration that computes
    with the lengths of prompts cannot be told beforehand: NaN. Raises ValueError for configs that make no such model.
    """
    silence_hf_logging()
    try:
        return _estimate(folder, device, batch_size, max_directions)
    except (UnusableModelError, MemoryError):
        raise
    except Exception as error:  # of any kind: what a config says is wrong for one of the libraries' layers
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"the configs of {folder} make no model: give `model` a whole diffusers folder: {reason}"
        ) from error


def _estimate(folder: Path, device: torch.device, batch_size: int, max_directions: int | None) -> pd.DataFrame:
    pipe = hollow_pipeline(folder)
    family = FAMILIES[type(pipe).__name__]
    original = getattr(pipe, family.denoiser)
    on_gpu, rows = _is_gpu(device), []
    texts = sum(_num_bytes(getattr(pipe, source.name)) for source in family.sources(pipe))
    other_parts = texts + _num_bytes(pipe.vae)
    in_float32 = 0 if family.denoiser == "transformer" else _num_bytes(original)  # as a U-Net is read
    for dtype, checkpointing in itertools.product(DTYPES, (False, True)):
        denoiser = deepcopy(original).requires_grad_(False).eval()
        setattr(pipe, family.denoiser, denoiser)
        loading = 0 if on_gpu else in_float32 + other_parts
        denoiser.to(dtype=DTYPES[dtype], memory_format=torch.channels_last)
        weights = _num_bytes(denoiser) + (0 if on_gpu else other_parts)
        width = sum(family.text_dims(denoiser.config))
        directions = min(max_directions or width, width)
        try:
            step = training_step_memory(pipe, batch_size, directions, checkpointing, 512 if on_gpu else 64)
        except DataDependentOutputException:  # as of Lumina 2, which computes with prompts' lengths
            step = math.nan
        held = max(weights + step, loading) / GIB + (_CONTEXT if on_gpu else _LIBRARIES)
        rows.append(_row("training", dtype, "yes" if checkpointing else "no", weights, step, held))
    weights, maps = in_float32 + other_parts, _merge_memory(text_layers(original))
    rows.append(_row("merge", "of the files", "", weights, maps, (weights + maps) / GIB + _LIBRARIES))
    table = pd.DataFrame(rows)
    fits = (table["peak"] <= 0.9 * total_memory(device) / GIB) & (table["for"] == "training")
    table["choice"] = ""
    if fits.any():
        table.loc[fits.idxmax(), "choice"] = "<-"
    return table


def _row(what: str, dtype: str, checkpointing: str, weights: int, step: float, peak: float) -> dict[str, Any]:
    """Return a row of the table, of bytes and of a peak in GiB."""
    return {
        "for": what,
        "dtype": dtype,
        "gradient checkpointing": checkpointing,
        "weights": weights / GIB,
        "beside them": step / GIB,
        "peak": peak,
    }


def _merge_memory(layers: TextLayers) -> int:
    """Return the bytes of what a merge holds beside the weights: the maps' sum, a layer and its products in float64.

    And the merged layers in float32.
    """
    sizes = [layers[name].out_features * layers.width for name in layers]
    return 8 * (layers.width**2 + 4 * max(sizes)) + 4 * sum(sizes)


def _num_bytes(part: nn.Module) -> int:
    return sum(weight.numel() * weight.element_size() for weight in part.parameters())
