"""Train the bundled model models/mini-sd from nothing: render its dataset, then autoencoder, text encoder and U-Net.

--config configs/mini-sd-logos.yaml trains models/mini-sd-logos, which starts from mini-sd and learns a hundred logos
too; mini-sd-dusk.yaml trains mini-sd's U-Net alone on images at dusk, under mini-sd's own text encoder. Stopped and
started again with the same command, it resumes from its last checkpoint in --checkpoint_dir.
"""

from pathlib import Path
from typing import Any

from ldm.cli import arguments
from ldm.cli.run import run
from ldm.io.paths import REPO_ROOT


def main() -> None:
    parser = arguments.make_parser(__doc__)
    parser.option("config", type=Path, default=REPO_ROOT / "configs" / "mini-sd.yaml", help="what to train, and how")
    parser.option("save_path", type=Path, default=REPO_ROOT / "models" / "own-mini-sd", help="the model")
    parser.option("checkpoint_dir", type=Path, default=REPO_ROOT / "models/mini-sd-training", help="to resume from")
    parser.option("text_encoder", type=Path, help="the frozen text encoder of a config that has one, if not its own")
    arguments.add_device(parser)
    args = parser.parse_args()
    from diffusers import AutoencoderKL
    from lightning_fabric import Fabric, seed_everything
    from omegaconf import OmegaConf

    from ldm.cli.devices import fabric_device
    from ldm.config.models import TRAINING_KEYS, SettingsSource, load_model_config, read_yaml, save_settings
    from ldm.diffusion.load import load_model
    from ldm.io.files import METADATA_FILE, atomic_write_dir, check_metadata, write_dir_metadata, write_json
    from ldm.io.tensors import CREATED_BY
    from ldm.toy import train
    from ldm.toy.captions import kept_tokenizer
    from ldm.toy.dataset import DatasetKind, cached_dataset, render_dataset
    from ldm.toy.text import Embeddings, Tokens, load_frozen_text

    config, work = read_yaml(args.config), args.checkpoint_dir
    if missing := [key for key in TRAINING_KEYS if key not in config]:
        raise ValueError(f"{args.config} lacks {', '.join(missing)}: `config` is a file such as configs/mini-sd.yaml")
    settings = SettingsSource("StableDiffusionPipeline", args.config)
    load_model_config(settings)  # refuses it before the training
    trained_config = OmegaConf.to_container(OmegaConf.masked_copy(config, list(TRAINING_KEYS)))
    metadata = {"created_by": CREATED_BY, "base_model": args.config.stem, "config": trained_config}
    kind = DatasetKind.of(config.dataset)
    max_length, text_encoder, tokenizer = config.tokenizer.model_max_length, None, None
    if "text_encoder" in config.train:
        text_dir = args.text_encoder or args.config.parent / config.train.text_encoder
        text_encoder, tokenizer = load_frozen_text(text_dir, max_length)
    elif args.text_encoder:
        raise ValueError(f"{args.config} trains a text encoder of its own: leave `text_encoder` out")
    check_metadata(work, metadata)
    write_json(work / METADATA_FILE, metadata)
    fabric = Fabric(**fabric_device(args.device), precision=config.train.precision)
    seed_everything(config.seed)
    start = load_model(REPO_ROOT / "models" / config.train.start, fabric.device) if "start" in config.train else None

    images, captions = cached_dataset(work / "dataset.npz", config.dataset.num_images, config.seed, kind)
    if start:
        vae = start.vae
    else:
        vae = AutoencoderKL(**OmegaConf.to_container(config.vae))
        stage = train.train_autoencoder(fabric, config, vae, images, work / "autoencoder.ckpt")
        train.show_progress(stage, config.train.autoencoder.iterations, "autoencoder")
    held_out, _ = render_dataset(config.dataset.num_held_out, config.seed + 1, kind)
    psnr = train.reconstruction_psnr(vae.to(fabric.device).eval(), held_out)
    print(f"autoencoder on {len(held_out)} held-out images: {psnr.mean():.2f} dB PSNR on average")

    latents = train.encode_all(fabric, vae, images)
    if not start:
        vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 5))  # so that their variance is 1
    latents = latents * vae.config.scaling_factor
    if text_encoder:
        conditions = Embeddings.of(captions, tokenizer, text_encoder, fabric.device)
        denoiser = train.FrozenTextDenoiser(config)
        if start:
            train.init_unet_from(start, denoiser.unet)
    else:
        tokenizer = kept_tokenizer(work / "tokenizer", max_length, kind.mixture_weights, config.seed)
        conditions = Tokens.of(captions, tokenizer)
        denoiser = train.Denoiser(config, tokenizer)
        if start:
            train.init_from(start, denoiser, tokenizer)
    ema = train.make_ema(denoiser, config.train.denoiser.ema).to(fabric.device)
    stage = train.train_denoiser(fabric, config, denoiser, ema, latents, conditions, work / "denoiser.ckpt")
    train.show_progress(stage, config.train.denoiser.iterations, "denoiser")
    with atomic_write_dir(args.save_path) as partial:
        kept: Any = ema.module
        train.save_pipeline(config, vae, kept.unet, text_encoder or kept.text_encoder, tokenizer, partial)
        save_settings(settings, partial)
        write_dir_metadata(partial, metadata)
    print(f"saved {args.save_path}")


if __name__ == "__main__":
    run(main)
