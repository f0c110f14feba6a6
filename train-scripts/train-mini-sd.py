"""Train the embedded model models/mini-sd from nothing: paint its world, then autoencoder, text encoder and U-Net.

Stopped and started again with the same command, it goes on from its last checkpoint in --work_path.
"""

import json
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from lightning_fabric import Fabric, seed_everything
from omegaconf import OmegaConf
from tqdm import tqdm

from ldm import cli
from ldm.concepts import ROOT
from ldm.mini import train
from ldm.mini.captions import build_tokenizer


def show(steps, total: int, name: str) -> None:
    mean = None
    with tqdm(total=total, desc=name, unit="step") as bar:
        for step, loss in steps:
            if mean is None:
                bar.initial = bar.n = step  # where the checkpoint was
            mean = loss if mean is None else 0.98 * mean + 0.02 * loss
            bar.set_postfix(loss=f"{mean:.4f}", refresh=False)
            bar.update()


def main() -> None:
    parser = cli.parser(__doc__)
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "mini-sd.yaml", help="what to train, and how")
    parser.add_argument("--save_path", type=Path, default=ROOT / "models" / "mini-sd", help="the model")
    parser.add_argument("--work_path", type=Path, default=ROOT / "models" / "mini-sd-training", help="checkpoints")
    args = parser.parse_args()
    config = OmegaConf.load(args.config)
    work = args.work_path
    work.mkdir(parents=True, exist_ok=True)
    fabric = Fabric(accelerator="auto", devices=1, precision=config.train.precision)
    seed_everything(config.seed)

    world = work / "world.npz"
    if not world.exists():
        pictures, captions = train.paint_world(config.world.pictures, config.seed)
        partial = work / "world-partial.npz"
        np.savez(partial, pictures=pictures, captions=np.array(json.dumps(captions)))
        partial.replace(world)
    with np.load(world) as stored:
        pictures, captions = stored["pictures"], json.loads(str(stored["captions"]))

    vae = AutoencoderKL(**OmegaConf.to_container(config.vae))
    show(train.train_autoencoder(fabric, config, vae, pictures, work / "autoencoder.ckpt"),
         config.train.autoencoder.steps, "autoencoder")
    held_out, _ = train.paint_world(config.world.held_out, config.seed + 1)
    with torch.no_grad():
        means = train.encode_all(fabric, vae, held_out)
        drawn = torch.cat([vae.decode(part.to(fabric.device)).sample.cpu() for part in means.split(100)])
        error = (drawn.clamp(-1, 1) - train.to_tensor(held_out)).square().mean((1, 2, 3)) / 4
    print(f"autoencoder on {len(held_out)} held-out pictures: {(-10 * error.log10()).mean():.2f} dB PSNR on average")

    latents = train.encode_all(fabric, vae, pictures)
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 5))
    latents *= vae.config.scaling_factor
    tokenizer = build_tokenizer(args.save_path / "tokenizer", config.tokenizer.model_max_length, config.seed)
    tokens = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
    denoiser = train.Denoiser(config, tokenizer)
    average = train.new_average(denoiser, config).to(fabric.device)
    show(train.train_denoiser(fabric, config, denoiser, average, latents, tokens, work / "denoiser.ckpt"),
         config.train.denoiser.steps, "denoiser")
    train.assemble(config, vae, average.module, tokenizer, args.save_path)
    print(f"saved {args.save_path}")


if __name__ == "__main__":
    cli.run(main)
