"""How much memory an SRS-ME erasure will take, told from a model's configs alone: nothing is loaded or computed."""

from __future__ import annotations

import itertools
import math
import os
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModel

from ldm.diffusion.components import check_configs, read_config
from ldm.diffusion.load import silence_hf_logging
from ldm.diffusion.text_layers import text_layers
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


def training_step_memory(
    unet: UNet2DConditionModel, batch_size: int, tokens: int, directions: int, checkpointing: bool, block: int
) -> int:
    """Return the bytes beside the frozen weights that `SRSMELoss` and Adam hold at the peak of an iteration.

    `unet` is on the meta device, in the dtype asked for. The loss itself runs, and back, on fake tensors, which have
    shapes but no data; attention is fused. What an allocator of `block` bytes cannot use in between is not known.
    """
    config: Any = unet.config
    host = torch.get_default_device()

    def predict_noise(latents: torch.Tensor, timestep: torch.Tensor, embeds: torch.Tensor) -> torch.Tensor:
        return unet(latents, timestep, embeds.to(unet.dtype)).sample.float()

    model: Any = SimpleNamespace(device=host, denoiser=unet, predict_noise=predict_noise)
    layers = text_layers(unet)
    with FakeTensorMode(allow_non_fake_inputs=True):
        unet.to_empty(device=host)
        with _AllocationCounter(block) as counter:
            embeds = torch.empty(1, tokens, config.cross_attention_dim)
            latents = torch.empty(
                batch_size, config.in_channels, config.sample_size, config.sample_size, dtype=unet.dtype
            )
            shift = SeparableShift.zeros(layers, torch.empty(directions, config.cross_attention_dim), 1.0)
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
    """Return an erasure's peak memory in GiB by dtype and gradient checkpointing, the most exact and fastest first.

    `folder` has the configs of the model's parts; `choice` marks the first row that fits into nine tenths of the
    device's memory. `max_directions` is the most that a shift has (None: as many as the prompts are wide). Weights are
    the U-Net's, and where the device is not a GPU the other parts' too, which cannot leave it; there loading in float32
    counts as well. Raises ValueError for a model of two text encoders, whose iteration is not estimated.
    """
    silence_hf_logging()
    if not (folder / "unet").is_dir():
        raise ValueError(f"{folder}: memory is estimated for Stable Diffusion 1.x and 2.x alone, and this has no U-Net")
    config: Any = UNet2DConditionModel.load_config(str(folder), subfolder="unet")
    if config.get("addition_embed_type"):
        raise ValueError(
            f"{folder}: memory is estimated for Stable Diffusion 1.x and 2.x alone, not for XL: try "
            "`unet_dtype` bfloat16 with "
            "`gradient_checkpointing`, which takes least"
        )
    check_configs(folder, is_xl=False)
    with torch.device("meta"):
        encoder: Any = AutoModel.from_config(AutoConfig.from_pretrained(str(folder), subfolder="text_encoder"))
        vae_config: Any = AutoencoderKL.load_config(str(folder), subfolder="vae")
        vae: Any = AutoencoderKL.from_config(vae_config)
    tokenizer = read_config(folder / "tokenizer" / "tokenizer_config.json")
    tokens = int(min(encoder.config.max_position_embeddings, tokenizer.get("model_max_length", math.inf)))
    on_gpu, rows = _is_gpu(device), []
    other_parts = 0 if on_gpu else _num_bytes(encoder) + _num_bytes(vae)
    for dtype, checkpointing in itertools.product(DTYPES, (False, True)):
        with torch.device("meta"):
            unet: Any = UNet2DConditionModel.from_config(config)
            unet.requires_grad_(False).eval()
        loading = 0 if on_gpu else _num_bytes(unet) + other_parts
        unet.to(dtype=DTYPES[dtype], memory_format=torch.channels_last)
        weights = _num_bytes(unet) + other_parts
        width = unet.config.cross_attention_dim
        directions = min(max_directions or width, width)
        step = training_step_memory(unet, batch_size, tokens, directions, checkpointing, 512 if on_gpu else 64)
        peak = max(weights + step, loading) / GIB + (_CONTEXT if on_gpu else _LIBRARIES)
        rows.append(
            {
                "dtype": dtype,
                "gradient checkpointing": "yes" if checkpointing else "no",
                "weights": weights / GIB,
                "iteration": step / GIB,
                "peak": peak,
            }
        )
    table = pd.DataFrame(rows)
    fits = table["peak"] <= 0.9 * total_memory(device) / GIB
    table["choice"] = ""
    if fits.any():
        table.loc[fits.idxmax(), "choice"] = "<-"
    return table


def _num_bytes(part: nn.Module) -> int:
    return sum(weight.numel() * weight.element_size() for weight in part.parameters())
