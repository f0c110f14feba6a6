"""Train the bundled model models/mini-flux from nothing: the FLUX architecture on mini-sd-minilm's text encoder.

Its autoencoder is that of mini-sd, and its dataset that of mini-sd-minilm. Stopped and started again with the same
command, it resumes from its last checkpoint in --checkpoint_dir.
"""

from pathlib import Path
from typing import Any

from ldm.cli import arguments
from ldm.cli.run import run
from ldm.io.paths import REPO_ROOT


def main() -> None:
    parser = arguments.make_parser(__doc__)
    parser.option("config", type=Path, default=REPO_ROOT / "configs" / "mini-flux.yaml", help="what to train, and how")
    parser.option("save_path", type=Path, default=REPO_ROOT / "models" / "own-mini-flux", help="the model")
    parser.option("checkpoint_dir", type=Path, default=REPO_ROOT / "models/mini-flux-training", help="to resume from")
    parser.option("text_encoder", type=Path, help="the frozen text encoder, if not that of the config")
    arguments.add_device(parser)
    args = parser.parse_args()
    from lightning_fabric import Fabric, seed_everything
    from omegaconf import OmegaConf

    from ldm.cli.devices import fabric_device
    from ldm.config.models import FLOW_KEYS, SettingsSource, load_model_config, read_yaml, save_settings
    from ldm.diffusion.load import load_model
    from ldm.io.files import METADATA_FILE, atomic_write_dir, check_metadata, write_dir_metadata, write_json
    from ldm.io.tensors import CREATED_BY
    from ldm.toy import flow, train
    from ldm.toy.dataset import DatasetKind, cached_dataset
    from ldm.toy.text import Embeddings, load_frozen_text, token_and_pooled_states

    config, work = read_yaml(args.config), args.checkpoint_dir
    if missing := [key for key in FLOW_KEYS if key not in config]:
        raise ValueError(f"{args.config} lacks {', '.join(missing)}: `config` is a file such as configs/mini-flux.yaml")
    settings = SettingsSource("FluxPipeline", args.config)
    load_model_config(settings)  # refuses it before the training
    trained_config = OmegaConf.to_container(OmegaConf.masked_copy(config, list(FLOW_KEYS)))
    metadata = {"created_by": CREATED_BY, "base_model": args.config.stem, "config": trained_config}
    text_dir = args.text_encoder or args.config.parent / config.train.text_encoder
    text_encoder, tokenizer = load_frozen_text(text_dir, config.tokenizer.model_max_length)
    check_metadata(work, metadata)
    write_json(work / METADATA_FILE, metadata)
    fabric = Fabric(**fabric_device(args.device), precision=config.train.precision)
    seed_everything(config.seed)
    vae = load_model(REPO_ROOT / "models" / config.train.start, fabric.device).vae

    kind = DatasetKind.of(config.dataset)
    images, captions = cached_dataset(work / "dataset.npz", config.dataset.num_images, config.seed, kind)
    latents = train.encode_all(fabric, vae, images) * vae.config.scaling_factor
    conditions = Embeddings.of(captions, tokenizer, text_encoder, fabric.device, token_and_pooled_states)
    denoiser = flow.FlowDenoiser(config, latents.shape[-1] // 2)
    ema = train.make_ema(denoiser, config.train.flow.ema).to(fabric.device)
    stage = flow.train_flow(fabric, config, denoiser, ema, latents, conditions, work / "denoiser.ckpt")
    train.show_progress(stage, config.train.flow.iterations, "flow")
    with atomic_write_dir(args.save_path) as partial:
        kept: Any = ema.module
        flow.save_flux_pipeline(vae, kept.transformer, text_encoder, tokenizer, partial)
        save_settings(settings, partial)
        write_dir_metadata(partial, metadata)
    print(f"saved {args.save_path}")


if __name__ == "__main__":
    run(main)
