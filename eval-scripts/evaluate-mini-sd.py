"""Measure what a bundled model's card reports: how well it generates, and how well its autoencoder reconstructs.

Generates style_classify.csv, object_classify.csv and watermark.csv, classifies the images, compares the watermarks with
the rendered ones, and encodes rendered images that training never saw. The same command resumes a stopped run.
"""

import time
from pathlib import Path

from ldm.cli import arguments, habits, output
from ldm.cli.run import run
from ldm.io.paths import REPO_ROOT


def main() -> None:
    parser = arguments.make_parser(__doc__)
    arguments.add_model(parser)
    save_path = REPO_ROOT / "evaluation_folder" / "mini-sd"
    parser.option("save_path", type=Path, default=save_path, help="for the images")
    text = "rendered images for the autoencoder"
    parser.option("num_held_out", type=arguments.positive_int, default=1000, help=text)
    arguments.add_sampling(parser, images_per_seed=1)
    arguments.add_device(parser)
    habits.add_json(parser)
    args = parser.parse_args()
    import pandas as pd
    from PIL import Image

    from ldm.cli import session
    from ldm.config.models import load_model_config, read_settings
    from ldm.diffusion.image_folder import generate_to_folder
    from ldm.io.images import image_filename, save_image
    from ldm.io.prompts import read_prompt_csv
    from ldm.metrics.classify import classifier_path, load_classifier
    from ldm.metrics.compare import accuracy_table
    from ldm.metrics.lpips import pairwise_metrics
    from ldm.toy.dataset import LIGHTS, DatasetKind, render_dataset
    from ldm.toy.render import render_watermark
    from ldm.toy.train import reconstruction_psnr

    device = session.first_device(args)
    model = session.load_model(args, device)
    sampling = session.fill_settings(args, load_model_config(model).sampling)
    config = read_settings(model.settings_path) if model.settings_path else {}
    if "dataset" not in config:
        raise ValueError(f"{args.model} was not trained here: pass as `model` a folder that train-mini-sd.py wrote")
    kind = DatasetKind.of(config["dataset"])

    def generate(name: str) -> Path:
        cases, folder = read_prompt_csv(REPO_ROOT / "data" / f"{name}.csv"), args.save_path / name
        start = time.perf_counter()
        num_generated = generate_to_folder(
            model, cases, folder, model.generation_metadata, sampling, args.images_per_seed
        )
        if num_generated:
            seconds = 64 * (time.perf_counter() - start) / num_generated
            print(f"{name}: {num_generated} images, {seconds:.1f} s for 64")
        return folder

    for category in ("style", "object"):
        classifier, metadata = load_classifier(classifier_path(category), device)
        table = accuracy_table(classifier, generate(f"{category}_classify"), category)
        output.show_table(table, category)
        print(
            f"mean {table.accuracy.mean():.2f} %, min {table.accuracy.min():.2f} %; the classifier itself: "
            f"{100 * metadata['accuracy']:.2f} % on held-out rendered images"
        )

    folder, rows = generate("watermark"), []
    for case in read_prompt_csv(REPO_ROOT / "data" / "watermark.csv"):
        if case.prompt:
            name = image_filename(case.case_number, 0)
            rendered = args.save_path / "rendered" / name
            save_image(rendered, Image.fromarray(LIGHTS[kind.light](render_watermark(case.prompt))))
            metrics = pairwise_metrics([rendered], [folder / name], device)
            rows.append((case.prompt, metrics["psnr"].item(), metrics["lpips"].item()))
    table = pd.DataFrame(rows, columns=["watermark", "psnr", "lpips"]).groupby("watermark", sort=False)
    table = table.agg(min_psnr=("psnr", "min"), mean_psnr=("psnr", "mean"), mean_lpips=("lpips", "mean"))
    output.show_table(table.reset_index(), "watermark")

    # Training's images are those of the seed itself.
    images, _ = render_dataset(args.num_held_out, config["seed"] + 1, kind)
    psnr = reconstruction_psnr(model.vae, images)
    print(
        f"\nautoencoder on {args.num_held_out} held-out images: {psnr.mean():.2f} dB PSNR on average, "
        f"{-10 * (10 ** (-psnr / 10)).mean().log10():.2f} dB of all pixels together"
    )


if __name__ == "__main__":
    run(main)
