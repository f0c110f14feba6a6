"""Generate the images of a prompt list by one model: a merged one by name, or any model folder.

Writes SAVE_PATH/MODEL_NAME; images that exist are kept, so that the same command resumes a stopped run.
"""

from pathlib import Path

from ldm.cli import arguments
from ldm.cli.run import run
from ldm.io.paths import REPO_ROOT


def main() -> None:
    parser = arguments.make_parser(__doc__)
    text = "a folder in --models_dir, or the path of a diffusers folder"
    parser.option("model_name", required=True, help=text)
    merged_dir = REPO_ROOT / "models" / "merged"
    parser.option("models_dir", type=Path, default=merged_dir, help="where Merge_model.py writes")
    arguments.add_prompt_list(parser)
    arguments.add_sampling(parser, images_per_seed=1)
    arguments.add_compile(parser)
    arguments.add_variant(parser)
    arguments.add_unet_dtype(parser)
    arguments.add_device(parser)
    args = parser.parse_args()
    arguments.spelled["model"] = "--model_name"  # what messages about a model advise
    import torch

    from ldm.cli import devices, session
    from ldm.config.models import load_model_config
    from ldm.diffusion.image_folder import generate_to_folder
    from ldm.diffusion.load import load_model
    from ldm.io.images import find_images

    cases = session.prompt_cases(args)
    merged = args.models_dir / args.model_name
    device, shard = devices.init_distributed(session.first_device(args))
    source = merged if merged.is_dir() else args.model_name
    model = load_model(source, device, dtype=getattr(torch, args.unet_dtype), variant=args.variant)
    session.report_guidance(model)
    sampling = session.fill_settings(args, load_model_config(model).sampling)
    folder = args.save_path / model.name
    num_generated = generate_to_folder(
        model, cases, folder, model.generation_metadata, sampling, args.images_per_seed, shard, args.compile
    )
    print(f"{num_generated} images generated, {len(find_images(folder))} in {folder}")


if __name__ == "__main__":
    run(main)
