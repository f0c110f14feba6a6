"""Train the bundled models: the autoencoder, then text encoder and U-Net together. Resumable and seeded.

Every stage is a generator that yields `(iteration, loss)`; the caller shows progress and may stop at any time. Each
stage keeps a checkpoint and resumes from it. A batch depends on the seed and the iteration alone. The images are those
of `toy.dataset`; `config` is a file such as configs/mini-sd.yaml, read by `ldm.config.models.read_yaml`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from lightning_fabric import Fabric
from omegaconf import DictConfig, OmegaConf
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torchmetrics.functional.image import peak_signal_noise_ratio
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from ldm.diffusion.model import DiffusionModel
from ldm.io.files import atomic_write, write_json
from ldm.io.pickles import UnreadablePickleError, load_torch_pickle
from ldm.io.tensors import named_writes
from ldm.toy.text import Captions


def pixels_to_tensor(images: np.ndarray) -> torch.Tensor:
    """Return images (N, H, W, 3) uint8 as (N, 3, H, W) float32 in [-1, 1], in the channels-last memory format."""
    scaled = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
    return scaled.contiguous(memory_format=torch.channels_last)


class Denoiser(nn.Module):
    """Text encoder and U-Net as one module, since they are trained together."""

    def __init__(self, config: DictConfig, tokenizer: CLIPTokenizer):
        super().__init__()
        special_tokens: dict[str, Any] = {
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        }
        text_config = CLIPTextConfig(
            vocab_size=len(tokenizer),
            max_position_embeddings=tokenizer.model_max_length,
            **special_tokens,
            **config.text_encoder,
        )
        unet_config: Any = OmegaConf.to_container(config.unet)
        self.text_encoder = CLIPTextModel(text_config)
        self.unet: Any = UNet2DConditionModel(**unet_config)

    def forward(self, noisy_latents: torch.Tensor, timesteps: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
        """Predict the noise in (N, C, h, w) at timesteps (N,) under token ids (N, tokens): (N, C, h, w)."""
        prompt_embeds = self.text_encoder(token_ids)[0]  # (N, tokens, d)
        return self.unet(noisy_latents, timesteps, prompt_embeds).sample


class FrozenTextDenoiser(nn.Module):
    """A U-Net that is trained alone, under the embeddings of a text encoder that stays as it is."""

    def __init__(self, config: DictConfig):
        super().__init__()
        unet_config: Any = OmegaConf.to_container(config.unet)
        self.unet: Any = UNet2DConditionModel(**unet_config)

    def forward(
        self, noisy_latents: torch.Tensor, timesteps: torch.Tensor, prompt_embeds: torch.Tensor
    ) -> torch.Tensor:
        """Predict the noise in (N, C, h, w) at timesteps (N,) under prompt embeddings (N, tokens, d): (N, C, h, w)."""
        return self.unet(noisy_latents, timesteps, prompt_embeds).sample


def init_unet_from(model: DiffusionModel, unet: nn.Module) -> None:
    """Give `unet` those weights of an older model that have the same name and shape; the others keep what they have."""
    own, old = unet.state_dict(), model.denoiser.state_dict()
    unet.load_state_dict(own | {name: value for name, value in old.items() if value.shape == own[name].shape})


def init_from(model: DiffusionModel, denoiser: Denoiser, tokenizer: CLIPTokenizer) -> None:
    """Give `denoiser` the weights of an older model of the same shape; tokens that are new keep what they have."""
    encoder: Any = denoiser.text_encoder
    embeddings = encoder.get_input_embeddings().weight
    old_embeddings = model.text_encoder.get_input_embeddings().weight
    old_vocab = model.pipeline.tokenizer.get_vocab()
    merged = embeddings.detach().clone()  # (vocabulary, d)
    for token, token_id in tokenizer.get_vocab().items():
        if token in old_vocab:
            merged[token_id] = old_embeddings[old_vocab[token]]
    denoiser.unet.load_state_dict(model.denoiser.state_dict())
    embeddings_name = next(name for name, weight in encoder.named_parameters() if weight is embeddings)
    encoder.load_state_dict(model.text_encoder.state_dict() | {embeddings_name: merged})


def show_progress(iterations: Iterator[tuple[int, float]], total: int, name: str) -> None:
    """Run a stage of a training, and show how far it is and its running mean loss."""
    mean = None
    with tqdm(total=total, desc=name, unit="iteration") as bar:
        for iteration, loss in iterations:
            if mean is None:
                bar.initial = bar.n = iteration  # where the checkpoint was
            mean = loss if mean is None else 0.98 * mean + 0.02 * loss
            bar.set_postfix(loss=f"{mean:.4f}", refresh=False)
            bar.update()


def _lr_factor(iteration: int, num_iterations: int, warmup: int) -> float:
    """Return the fraction of the peak learning rate at an iteration: linear warm-up, then a cosine to zero."""
    if iteration < warmup:
        return (iteration + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (iteration - warmup) / max(num_iterations - warmup, 1)))


def fit(
    fabric: Fabric,
    module: nn.Module,
    loss_of: Callable[[Any, int], torch.Tensor],
    settings: DictConfig,
    save_every: int,
    path: Path,
    ema: AveragedModel | None = None,
    vocabulary: str = "",
) -> Iterator[tuple[int, float]]:
    """Run `settings.iterations` of AdamW on `loss_of(module, iteration)`, and yield (iteration, loss).

    It resumes from the checkpoint at `path` if there is one, and writes it every `save_every` iterations. `ema` is
    updated in every iteration. `vocabulary` is the digest of the tokenizer whose tokens the module is trained on.
    Raises ValueError for a checkpoint that cannot be resumed from, as one of another vocabulary.
    """
    optimizer: Any = torch.optim.AdamW(module.parameters(), lr=settings.lr, betas=(0.9, 0.99), weight_decay=0.01)
    module, optimizer = fabric.setup(module, optimizer)
    state: dict[str, Any] = {"module": module, "optimizer": optimizer, "iteration": 0, "vocabulary": vocabulary}
    if ema is not None:
        state["ema"] = ema
    if path.exists():
        _resume(fabric, path, state, settings.iterations)
    for iteration in range(state["iteration"], settings.iterations):
        for group in optimizer.param_groups:
            group["lr"] = settings.lr * _lr_factor(iteration, settings.iterations, settings.warmup)
        optimizer.zero_grad()
        loss = loss_of(module, iteration)
        fabric.backward(loss)
        fabric.clip_gradients(module, optimizer, max_norm=1.0, error_if_nonfinite=True)
        optimizer.step()
        if ema is not None:
            ema.update_parameters(module)
        state["iteration"] = iteration + 1
        if (iteration + 1) % save_every == 0 or iteration + 1 == settings.iterations:
            with atomic_write(path) as partial_path, named_writes(path):
                fabric.save(partial_path, state)
        yield iteration, loss.detach().item()


def _resume(fabric: Fabric, path: Path, state: dict[str, Any], num_iterations: int) -> None:
    """Fill `state` from the checkpoint at `path`. Raises ValueError, with what to do, where it is none of this state.

    A checkpoint of an older version names no vocabulary: the autoencoder's, which needs none, is resumed from.
    """
    advice = "remove it to begin anew"
    try:
        saved = load_torch_pickle(path)
        if saved.get("vocabulary", "") != state["vocabulary"]:
            raise ValueError(f"{path} was trained on tokens of another vocabulary than today's tokenizer: {advice}")
        if saved.keys() | {"vocabulary"} != state.keys() or not 0 <= saved["iteration"] <= num_iterations:
            raise ValueError(f"{path} is no checkpoint of this training: {advice}")
        filled = {name: value for name, value in state.items() if name in saved}
        fabric.load(path, filled)
        state.update(filled)
    except (UnreadablePickleError, RuntimeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged, or no checkpoint of this training: {advice}") from error


def train_autoencoder(
    fabric: Fabric, config: DictConfig, vae: AutoencoderKL, images: np.ndarray, path: Path
) -> Iterator[tuple[int, float]]:
    """Train `vae` in place on images (N, H, W, 3) uint8: mean squared error plus a small KL term.

    Yields (iteration, loss).
    """
    settings = config.train.autoencoder
    module: Any = vae

    def loss_of(module: Any, iteration: int) -> torch.Tensor:
        indices = np.random.default_rng([config.seed, 1, iteration]).integers(len(images), size=settings.batch)
        batch = fabric.to_device(pixels_to_tensor(images[indices]))  # (N, 3, H, W)
        posterior = module.encode(batch).latent_dist
        generator = torch.Generator(batch.device).manual_seed(config.seed * 1_000_003 + iteration)
        reconstruction = module.decode(posterior.sample(generator)).sample
        kl_term = settings.kl * posterior.kl().mean() / posterior.mean[0].numel()
        return F.mse_loss(reconstruction.float(), batch) + kl_term

    module.to(memory_format=torch.channels_last)
    return fit(fabric, module, loss_of, settings, config.train.save_every, path)


@torch.no_grad()
def encode_all(fabric: Fabric, vae: AutoencoderKL, images: np.ndarray, batch_size: int = 128) -> torch.Tensor:
    """Return the latent means of images (N, H, W, 3) uint8, unscaled, (N, C, h, w) float32 on the CPU."""
    module: Any = vae
    module = module.eval().to(fabric.device)
    latents = []
    with fabric.autocast():
        for start in range(0, len(images), batch_size):
            batch = fabric.to_device(pixels_to_tensor(images[start : start + batch_size]))
            latents.append(module.encode(batch).latent_dist.mean.float().cpu())
    return torch.cat(latents)


@torch.no_grad()
def reconstruction_psnr(vae: AutoencoderKL, images: np.ndarray, batch_size: int = 100) -> torch.Tensor:
    """Return the PSNR in dB of images (N, H, W, 3) uint8, each reconstructed from its latent mean: (N,)."""
    module: Any = vae
    results = []
    for batch in pixels_to_tensor(images).split(batch_size):
        latents = module.encode(batch.to(module.device, module.dtype)).latent_dist.mean
        reconstruction = module.decode(latents).sample.float().cpu().clamp(-1, 1)
        results.append(peak_signal_noise_ratio(reconstruction, batch, data_range=2.0, reduction="none", dim=(1, 2, 3)))
    return torch.cat(results)


def train_denoiser(
    fabric: Fabric,
    config: DictConfig,
    denoiser: Denoiser | FrozenTextDenoiser,
    ema: AveragedModel,
    latents: torch.Tensor,
    captions: Captions,
    path: Path,
) -> Iterator[tuple[int, float]]:
    """Train `denoiser` in place to predict the noise in scaled latents under their captions. Yields (iteration, loss).

    `latents` are (N, C, h, w); `ema` follows `denoiser`.
    """
    settings = config.train.denoiser
    scheduler: Any = DDPMScheduler(**config.scheduler)  # a solver's add_noise counts its own steps, not training's
    # Errors of the noise count most where little signal is left: there they are what decides an image's colors and
    # shapes. 1 / a_t is the weight of velocity prediction (Salimans and Ho, arXiv 2202.00512), bounded here.
    weight = 1 / (scheduler.alphas_cumprod + 0.02)  # (num_train_timesteps,)

    def loss_of(module: Any, iteration: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + iteration)
        indices = torch.randint(len(latents), (settings.batch,), generator=generator)
        clean = latents[indices]
        noise = torch.randn(clean.shape, generator=generator)
        timesteps = torch.randint(scheduler.config.num_train_timesteps, (settings.batch,), generator=generator)
        noisy = scheduler.add_noise(clean, noise, timesteps).contiguous(memory_format=torch.channels_last)
        inputs = (fabric.to_device(tensor) for tensor in (noisy, timesteps, captions.batch(indices)))
        error = (module(*inputs).float() - fabric.to_device(noise)).square().mean((1, 2, 3))  # (N,)
        return (error * weight[timesteps].to(error)).mean()

    module: Any = denoiser
    module.to(memory_format=torch.channels_last)
    return fit(fabric, module, loss_of, settings, config.train.save_every, path, ema, captions.vocabulary)


def make_ema(denoiser: nn.Module, decay: float) -> AveragedModel:
    """Return the exponential moving average of the weights, which is what is kept in the end."""
    return AveragedModel(denoiser, multi_avg_fn=get_ema_multi_avg_fn(decay))


def save_pipeline(
    config: DictConfig, vae: AutoencoderKL, unet: UNet2DConditionModel, text_encoder: Any, tokenizer: Any, folder: Path
) -> None:
    """Save everything as a Stable Diffusion pipeline in fp16 safetensors, which plain diffusers loads."""
    scheduler: Any = DPMSolverMultistepScheduler(**config.scheduler)
    safety: Any = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    pipeline: Any = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        **safety,
    )
    pipeline.to(torch.float16).save_pretrained(folder, safe_serialization=True)
    finish_folder(folder)


def finish_folder(folder: Path) -> None:
    """Let a text encoder's config ask for float32, and leave out where parts came from: paths of this machine.

    A call that names no dtype would else read the text encoder as it is stored, beside parts in float32.
    """
    for path in folder.rglob("*.json"):
        content = json.loads(path.read_text(encoding="utf-8"))
        if path == folder / "text_encoder" / "config.json":
            write_json(path, content | {"dtype": "float32"})
        elif content.pop("_name_or_path", None) is not None:
            write_json(path, content)
