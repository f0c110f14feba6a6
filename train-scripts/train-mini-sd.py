"""Train the embedded model models/mini-sd from nothing: paint its world, then autoencoder, text encoder and U-Net.

--config configs/mini-many.yaml trains models/mini-many, which starts from mini-sd and learns a hundred logos too.
Stopped and started again with the same command, it goes on from its last checkpoint in --work_path.
"""

from pathlib import Path

from diffusers import AutoencoderKL
from lightning_fabric import Fabric, seed_everything
from omegaconf import OmegaConf
from tqdm import tqdm

from ldm import cli
from ldm.io.paths import REPO_ROOT
from ldm.io.files import METADATA_FILE, atomic_write_dir, check_metadata, write_json
from ldm.mini import train
from ldm.toy.captions import build_tokenizer
from ldm.config.models import read_model_config
from ldm.diffusion.load import load_model


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
    parser.add_argument("--config", type=Path, default=REPO_ROOT / "configs" / "mini-sd.yaml", help="what to train, and how")
    parser.add_argument("--save_path", type=Path, default=REPO_ROOT / "models" / "own-mini-sd", help="the model")
    parser.add_argument("--work_path", type=Path, default=REPO_ROOT / "models" / "mini-sd-training", help="checkpoints")
    args = parser.parse_args()
    config = read_model_config(args.config)
    work = args.work_path
    made = {name: config[name] for name in ("seed", "world", "tokenizer", "text_encoder", "vae", "unet", "scheduler", "train")}
    recipe = {"made_by": "train-mini-sd.py", "base": args.config.stem, "config": OmegaConf.to_container(OmegaConf.create(made))}
    check_metadata(work, recipe)
    write_json(work / METADATA_FILE, recipe)
    fabric = Fabric(accelerator="auto", devices=1, precision=config.train.precision)
    seed_everything(config.seed)
    older = load_model(REPO_ROOT / "models" / config.train.start, fabric.device) if "start" in config.train else None

    world = config.world
    pictures, captions = train.stored_world(work / "world.npz", world.needs_images, config.seed, world.shares)
    if older:
        vae = older.vae
    else:
        vae = AutoencoderKL(**OmegaConf.to_container(config.vae))
        show(train.train_autoencoder(fabric, config, vae, pictures, work / "autoencoder.ckpt"),
             config.train.autoencoder.steps, "autoencoder")
    held_out, _ = train.paint_world(world.held_out, config.seed + 1, world.shares)
    psnr = train.reconstruction_psnr(vae.to(fabric.device).eval(), held_out)
    print(f"autoencoder on {len(held_out)} held-out pictures: {psnr.mean():.2f} dB PSNR on average")

    latents = train.encode_all(fabric, vae, pictures)
    if not older:
        vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 5))  # so that their variance is 1
    latents = latents * vae.config.scaling_factor
    tokenizer = build_tokenizer(work / "tokenizer", config.tokenizer.model_max_length, world.shares, config.seed)
    tokens = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
    denoiser = train.Denoiser(config, tokenizer)
    if older:
        train.begin_from(older, denoiser, tokenizer)
    average = train.new_average(denoiser, config).to(fabric.device)
    show(train.train_denoiser(fabric, config, denoiser, average, latents, tokens, work / "denoiser.ckpt"),
         config.train.denoiser.steps, "denoiser")
    with atomic_write_dir(args.save_path) as partial:
        train.assemble(config, vae, average.module, tokenizer, partial)
        write_json(partial / METADATA_FILE, recipe)
    print(f"saved {args.save_path}")


if __name__ == "__main__":
    cli.run(main)
