"""TODO erasure.memory."""

from __future__ import annotations

from diffusers import AutoencoderKL, UNet2DConditionModel
import itertools
import os
import pandas as pd
from pathlib import Path
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import CLIPTextConfig, CLIPTextModel
from types import SimpleNamespace
import weakref
from ldm.diffusion.load import silence_hf_logging
from ldm.diffusion.text_layers import text_layers
from ldm.erasure.losses import SRSMELoss
from ldm.erasure.shift import SeparableShift


GIB = 2 ** 30


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}  # and float16 as bfloat16


_LIBRARIES, _CONTEXT = 1.2, 0.6  # GiB that Python and its libraries take for themselves, and what CUDA takes on a GPU


class _AllocationCounter(TorchDispatchMode):
    """While the block runs, counts the bytes of tensors made within it, in whole blocks of an allocator: `peak` the most."""

    def __init__(self, block: int):
        super().__init__()
        self.block, self.now, self.peak = block, 0, 0
        self.known = weakref.WeakSet()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.known.update(_storages((args, kwargs)))  # what comes in was there before; views and results in place share it
        result = func(*args, **(kwargs or {}))
        for storage in _storages(result):
            if storage not in self.known:
                self.known.add(storage)
                self._count(size := -(-storage.nbytes() // self.block) * self.block)
                weakref.finalize(storage, self._count, -size)
        self.peak = max(self.peak, self.now)
        return result

    def _count(self, size: int) -> None:
        self.now += size


def _storages(tree: object) -> list[torch.UntypedStorage]:
    return [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def training_step_memory(unet: UNet2DConditionModel, batch: int, tokens: int, directions: int, checkpointing: bool, block: int) -> int:
    """The bytes beside the frozen weights that `SeparableErasure` and Adam hold at the peak of a step with `batch` latents.

    `unet` is on the meta device, in the dtype asked for. The loss itself runs, and back, on fake tensors, which have shapes
    but no data; attention is fused. What an allocator of `block` bytes cannot use in between is not known.
    """
    channels, side, width = unet.config.in_channels, unet.config.sample_size, unet.config.cross_attention_dim
    host = torch.get_default_device()
    model = SimpleNamespace(device=host, unet=unet, predict_noise=lambda z, t, e: unet(z, t, e.to(unet.dtype)).sample.float())
    with FakeTensorMode(allow_non_fake_inputs=True):
        unet.to_empty(device=host)
        with _AllocationCounter(block) as held:
            prompt, latents = torch.empty(1, tokens, width), torch.empty(batch, channels, side, side, dtype=unet.dtype)
            layers = text_layers(unet)
            learnt = SeparableShift.zeros(layers, torch.empty(directions, width), 1.0)
            loss = SRSMELoss(model, layers, learnt, prompt, prompt, 1.0)
            loss.checkpointing = checkpointing
            adam = [torch.zeros_like(weight) for weight in loss.parameters() for _ in range(2)]  # its two moments
            loss(latents, torch.empty(batch, dtype=torch.long)).total.backward()
    return held.peak


def _is_gpu(device: torch.device) -> bool:
    return device.type != torch.get_default_device().type


def total_memory(device: torch.device) -> int:
    """Bytes that the device has in all."""
    if _is_gpu(device):
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def estimate_memory(folder: Path, device: torch.device, batch: int, directions: int | None) -> pd.DataFrame:
    """The peak memory in GiB of an erasure in each choice of dtype and gradient checkpointing, the most exact and fastest
    first, for a model whose parts' configs are in `folder`; `choice` marks the first that fits into nine tenths of the
    device's memory. `directions` is the most that a shift has (None: as many as the prompts' width).

    Weights are the U-Net's, and where the device is not a GPU the other parts' too, which cannot leave it; there loading
    in float32 counts as well. Raises ValueError for a model of two text encoders, whose step is not foreseen.
    """
    silence_hf_logging()
    config = UNet2DConditionModel.load_config(str(folder), subfolder="unet")
    if config.get("addition_embed_type"):
        raise ValueError(f"{folder}: memory is foreseen for Stable Diffusion 1.x and 2.x alone, not for XL: try --dtype bfloat16 "
                         "--gradient_checkpointing, which takes least")
    with torch.device("meta"):
        encoder = CLIPTextModel(CLIPTextConfig.from_pretrained(str(folder), subfolder="text_encoder"))
        vae = AutoencoderKL.from_config(AutoencoderKL.load_config(str(folder), subfolder="vae"))
    tokens = encoder.config.max_position_embeddings
    on_gpu, rows = _is_gpu(device), []
    beside = 0 if on_gpu else _num_bytes(encoder) + _num_bytes(vae)
    for dtype, checkpointing in itertools.product(DTYPES, (False, True)):
        with torch.device("meta"):
            unet = UNet2DConditionModel.from_config(config).requires_grad_(False).eval()
        loading = 0 if on_gpu else _num_bytes(unet) + beside
        unet.to(dtype=DTYPES[dtype], memory_format=torch.channels_last)
        weights = _num_bytes(unet) + beside
        width = unet.config.cross_attention_dim
        step = training_step_memory(unet, batch, tokens, min(directions or width, width), checkpointing, 512 if on_gpu else 64)
        rows.append({"dtype": dtype, "gradient checkpointing": "yes" if checkpointing else "no", "weights": weights / GIB,
                     "step": step / GIB, "peak": max(weights + step, loading) / GIB + (_CONTEXT if on_gpu else _LIBRARIES)})
    table = pd.DataFrame(rows)
    fits = table["peak"] <= 0.9 * total_memory(device) / GIB
    table["choice"] = ""
    if fits.any():
        table.loc[fits.idxmax(), "choice"] = "<-"
    return table


def _num_bytes(part: nn.Module) -> int:
    return sum(weight.numel() * weight.element_size() for weight in part.parameters())
