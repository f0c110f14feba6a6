"""What trains the embedded model: pictures, autoencoder, then text encoder and U-Net together. Resumable and seeded.

Every stage is a generator that yields `(step, loss)`; the caller shows progress and may stop at any time. Each keeps a
checkpoint in the work folder and starts again from it. Batches depend on the seed and the step alone.
"""

from __future__ import annotations

import json
import math
import multiprocessing
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import (AutoencoderKL, DDPMScheduler, DPMSolverMultistepScheduler, StableDiffusionPipeline,
                       UNet2DConditionModel)
from lightning_fabric import Fabric
from omegaconf import DictConfig, OmegaConf
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torchmetrics.functional.image import peak_signal_noise_ratio
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from ldm.io.files import atomic_write
from ldm.toy.captions import sample_caption
from ldm.diffusion.model import DiffusionModel


def _render_caption(seed: tuple[int, int], shares: Sequence[float]) -> tuple[np.ndarray, str]:
    rng = np.random.default_rng(seed)
    captioned = sample_caption(rng, shares)
    return captioned.paint(rng), captioned.caption


def render_dataset(count: int, seed: int, shares: Sequence[float], workers: int = 2) -> tuple[np.ndarray, list[str]]:
    """`count` captioned pictures, (count, 64, 64, 3) uint8 and their captions; the same for the same seed and `shares`."""
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        pairs = pool.map(partial(_render_caption, shares=list(shares)), [(seed, index) for index in range(count)], chunksize=256)
    return np.stack([picture for picture, _ in pairs]), [caption for _, caption in pairs]


def cached_dataset(path: Path, count: int, seed: int, shares: Sequence[float]) -> tuple[np.ndarray, list[str]]:
    """`paint_world`, painted once and kept at `path` (npz)."""
    if not path.exists():
        pictures, captions = render_dataset(count, seed, shares)
        with atomic_write(path) as new:
            np.savez(new, pictures=pictures, captions=np.array(json.dumps(captions)))
    with np.load(path) as stored:
        return stored["pictures"], json.loads(str(stored["captions"]))


def pixels_to_tensor(pictures: np.ndarray) -> torch.Tensor:
    """(N, H, W, 3) uint8 -> (N, 3, H, W) float32 in [-1, 1], channels last."""
    return (torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1).contiguous(
        memory_format=torch.channels_last)


class Denoiser(nn.Module):
    """Text encoder and U-Net as one module, since they are trained together."""

    def __init__(self, config: DictConfig, tokenizer: CLIPTokenizer):
        super().__init__()
        self.text_encoder = CLIPTextModel(CLIPTextConfig(
            vocab_size=len(tokenizer), max_position_embeddings=tokenizer.model_max_length,
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id, **config.text_encoder))
        self.unet = UNet2DConditionModel(**OmegaConf.to_container(config.unet))

    def forward(self, noisy: torch.Tensor, step: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        embedding = self.text_encoder(tokens)[0]  # (N, tokens, d)
        return self.unet(noisy, step, embedding).sample


def init_from(model: DiffusionModel, denoiser: Denoiser, tokenizer: CLIPTokenizer) -> None:
    """Give `denoiser` the weights of an older model of the same shape; tokens that it did not know keep what they have."""
    encoder = denoiser.text_encoder
    new = encoder.get_input_embeddings().weight.detach().clone()
    old, known = model.text_encoder.get_input_embeddings().weight, model.pipeline.tokenizer.get_vocab()
    for token, number in tokenizer.get_vocab().items():
        if token in known:
            new[number] = old[known[token]]
    denoiser.unet.load_state_dict(model.unet.state_dict())
    place = next(name for name, weight in encoder.named_parameters() if weight is encoder.get_input_embeddings().weight)
    encoder.load_state_dict(model.text_encoder.state_dict() | {place: new})


def _lr_factor(step: int, steps: int, warmup: int) -> float:
    """Linear warm-up, then a cosine to zero: the share of the peak rate at `step`."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(steps - warmup, 1)))


def _fit(fabric: Fabric, module: nn.Module, loss_of, settings: DictConfig, save_every: int, path: Path,
         average: AveragedModel | None = None) -> Iterator[tuple[int, float]]:
    """Run `settings.steps` steps of AdamW on `loss_of(module, step)`, from the checkpoint at `path` if there is one."""
    optimizer = torch.optim.AdamW(module.parameters(), lr=settings.lr, betas=(0.9, 0.99), weight_decay=0.01)
    module, optimizer = fabric.setup(module, optimizer)
    state = {"module": module, "optimizer": optimizer, "step": 0}
    if average is not None:
        state["average"] = average
    if path.exists():
        fabric.load(path, state)
    for step in range(state["step"], settings.steps):
        for group in optimizer.param_groups:
            group["lr"] = settings.lr * _lr_factor(step, settings.steps, settings.warmup)
        optimizer.zero_grad()
        loss = loss_of(module, step)
        fabric.backward(loss)
        fabric.clip_gradients(module, optimizer, max_norm=1.0, error_if_nonfinite=True)
        optimizer.step()
        if average is not None:
            average.update_parameters(module)
        state["step"] = step + 1
        if (step + 1) % save_every == 0 or step + 1 == settings.steps:
            new = path.with_suffix(".partial")
            fabric.save(new, state)
            new.replace(path)
        yield step, loss.detach().item()


def train_autoencoder(fabric: Fabric, config: DictConfig, vae: AutoencoderKL, pictures: np.ndarray,
                      path: Path) -> Iterator[tuple[int, float]]:
    """Mean squared error plus a small KL term; `vae` is trained in place."""
    settings = config.train.autoencoder

    def loss_of(module, step):
        chosen = np.random.default_rng([config.seed, 1, step]).integers(len(pictures), size=settings.batch)
        images = fabric.to_device(pixels_to_tensor(pictures[chosen]))
        posterior = module.encode(images).latent_dist
        generator = torch.Generator(images.device).manual_seed(config.seed * 1_000_003 + step)
        drawn = module.decode(posterior.sample(generator)).sample
        return F.mse_loss(drawn.float(), images) + settings.kl * posterior.kl().mean() / posterior.mean[0].numel()

    vae.to(memory_format=torch.channels_last)
    return _fit(fabric, vae, loss_of, settings, config.train.save_every, path)


@torch.no_grad()
def encode_all(fabric: Fabric, vae: AutoencoderKL, pictures: np.ndarray, batch: int = 128) -> torch.Tensor:
    """The latent means of all pictures, unscaled, (N, 8, 16, 16) float32 on the CPU."""
    vae = vae.eval().to(fabric.device)
    with fabric.autocast():
        return torch.cat([vae.encode(fabric.to_device(pixels_to_tensor(pictures[k:k + batch]))).latent_dist.mean.float().cpu()
                          for k in range(0, len(pictures), batch)])


@torch.no_grad()
def reconstruction_psnr(vae: AutoencoderKL, pictures: np.ndarray, batch: int = 100) -> torch.Tensor:
    """PSNR in dB of each picture's reconstruction from its latent mean, (N,)."""
    found = []
    for images in pixels_to_tensor(pictures).split(batch):
        drawn = vae.decode(vae.encode(images.to(vae.device, vae.dtype)).latent_dist.mean).sample.float().cpu()
        found.append(peak_signal_noise_ratio(drawn.clamp(-1, 1), images, data_range=2.0, reduction="none", dim=(1, 2, 3)))
    return torch.cat(found)


def train_denoiser(fabric: Fabric, config: DictConfig, denoiser: Denoiser, average: AveragedModel,
                   latents: torch.Tensor, tokens: torch.Tensor, path: Path) -> Iterator[tuple[int, float]]:
    """Predict the noise in scaled `latents` (N, C, h, w) given `tokens` (N, length); `average` follows `denoiser`."""
    settings = config.train.denoiser
    scheduler = DDPMScheduler(**config.scheduler)  # a solver's add_noise counts its own steps, not training's
    # Errors of the noise count most where little signal is left: there they are what decides a picture's colours and
    # shapes. 1 / a_t is the weight of velocity prediction (Salimans and Ho, arXiv 2202.00512), bounded here.
    weight = 1 / (scheduler.alphas_cumprod + 0.02)

    def loss_of(module, step):
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
        chosen = torch.randint(len(latents), (settings.batch,), generator=generator)
        clean = latents[chosen]
        noise = torch.randn(clean.shape, generator=generator)
        when = torch.randint(scheduler.config.num_train_timesteps, (settings.batch,), generator=generator)
        noisy = scheduler.add_noise(clean, noise, when).contiguous(memory_format=torch.channels_last)
        noisy, when, noise, words = (fabric.to_device(x) for x in (noisy, when, noise, tokens[chosen]))
        error = (module(noisy, when, words).float() - noise).square().mean((1, 2, 3))  # (N,)
        return (error * weight[when.cpu()].to(error)).mean()

    denoiser.to(memory_format=torch.channels_last)
    return _fit(fabric, denoiser, loss_of, settings, config.train.save_every, path, average)


def make_ema(denoiser: Denoiser, config: DictConfig) -> AveragedModel:
    """The exponential moving average of the weights, which is what is kept in the end."""
    return AveragedModel(denoiser, multi_avg_fn=get_ema_multi_avg_fn(config.train.denoiser.ema))


def save_pipeline(config: DictConfig, vae: AutoencoderKL, denoiser: Denoiser, tokenizer: CLIPTokenizer,
             folder: Path) -> None:
    """Save everything as a Stable Diffusion pipeline in fp16 safetensors, which plain diffusers loads."""
    StableDiffusionPipeline(
        vae=vae, text_encoder=denoiser.text_encoder, tokenizer=tokenizer, unet=denoiser.unet,
        scheduler=DPMSolverMultistepScheduler(**config.scheduler), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False).to(torch.float16).save_pretrained(folder, safe_serialization=True)
