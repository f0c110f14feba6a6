"""Train the bundled model of the FLUX architecture: a flow from noise to images, under a frozen text encoder.

With x clean latents, e noise and s in (0, 1) the transformer predicts the velocity `e - x` from `(1 - s) x + s e`
(rectified flow, Liu et al., arXiv 2209.03003; s is a logit-normal, Esser et al., 2403.03206).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from lightning_fabric import Fabric
from omegaconf import DictConfig, OmegaConf
from torch import nn
from torch.optim.swa_utils import AveragedModel

from ldm.io.files import write_json
from ldm.toy.text import Captions
from ldm.toy.train import finish_folder, fit

_LINKED = "text_encoder_2"  # which is the same encoder once more


def pack(latents: torch.Tensor) -> torch.Tensor:
    """Return latents (N, C, h, w) as FLUX takes them: squares of four as one token, (N, h w / 4, 4 C)."""
    number, channels, height, width = latents.shape
    squares = latents.view(number, channels, height // 2, 2, width // 2, 2)
    return squares.permute(0, 2, 4, 1, 3, 5).reshape(number, height * width // 4, 4 * channels)


class FlowDenoiser(nn.Module):
    """FLUX's transformer, on packed latents of `side` tokens a side."""

    def __init__(self, config: DictConfig, side: int):
        super().__init__()
        transformer_config: Any = OmegaConf.to_container(config.transformer)
        self.transformer: Any = FluxTransformer2DModel(**transformer_config)
        rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
        places = torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).view(-1, 3)  # (side^2, 3)
        self.register_buffer("image_ids", places.float(), persistent=False)

    def forward(self, noisy: torch.Tensor, sigmas: torch.Tensor, embeds: torch.Tensor) -> torch.Tensor:
        """Predict the velocity of packed latents (N, s, C) at noise levels (N,), under rows (N, tokens + 1, d)."""
        image_ids: Any = self.image_ids
        return self.transformer(
            hidden_states=noisy,
            timestep=sigmas,
            encoder_hidden_states=embeds[:, :-1],
            pooled_projections=embeds[:, -1],
            img_ids=image_ids,
            txt_ids=torch.zeros(embeds.shape[1] - 1, 3, device=embeds.device),
            return_dict=False,
        )[0]


def train_flow(
    fabric: Fabric,
    config: DictConfig,
    denoiser: FlowDenoiser,
    ema: AveragedModel,
    latents: torch.Tensor,
    captions: Captions,
    path: Path,
) -> Iterator[tuple[int, float]]:
    """Train `denoiser` in place on scaled latents (N, C, h, w) under their captions. Yields (iteration, loss).

    `ema` follows `denoiser`; the training resumes from the checkpoint at `path`.
    """
    settings = config.train.flow
    packed = pack(latents)

    def loss_of(module: Any, iteration: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + iteration)
        indices = torch.randint(len(packed), (settings.batch,), generator=generator)
        clean = packed[indices]
        noise = torch.randn(clean.shape, generator=generator)
        sigmas = torch.sigmoid(settings.timestep_mean + torch.randn(settings.batch, generator=generator))
        noisy = torch.lerp(clean, noise, sigmas[:, None, None])
        inputs = (fabric.to_device(tensor) for tensor in (noisy, sigmas, captions.batch(indices)))
        return (module(*inputs).float() - fabric.to_device(noise - clean)).square().mean()

    return fit(fabric, denoiser, loss_of, settings, config.train.save_every, path, ema, captions.vocabulary)


def save_flux_pipeline(
    vae: AutoencoderKL, transformer: FluxTransformer2DModel, text_encoder: Any, tokenizer: Any, folder: Path
) -> None:
    """Save everything as a FLUX pipeline in fp16 safetensors, which plain diffusers loads.

    Both of its text encoders are the same one, and the folder of the second is a link to that of the first.
    """
    vae.register_to_config(shift_factor=0.0)  # which FLUX's pipeline adds
    make: Any = FluxPipeline
    pipeline = make(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        text_encoder_2=None,
        tokenizer_2=tokenizer,
        transformer=transformer,
    )
    pipeline.to(torch.float16).save_pretrained(folder, safe_serialization=True)
    finish_folder(folder)
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    write_json(folder / "model_index.json", index | {_LINKED: index["text_encoder"]})
    (folder / _LINKED).symlink_to("text_encoder")
