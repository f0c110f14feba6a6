"""The figures of the embedded model's card: how well it draws its world, and how well its autoencoder keeps pictures.

Draws style_classify.csv, object_classify.csv and watermark.csv, counts them by the classifiers, compares the watermarks
with their pictures, and encodes painted pictures that training never saw. Goes on where it stopped.
"""

import time
from pathlib import Path

import pandas as pd
from PIL import Image

from ldm import cli
from ldm.io.paths import REPO_ROOT
from ldm.io.images import image_filename, save_image
from ldm.io.prompts import read_prompt_csv
from ldm.metrics.classify import classifier_path, load_classifier
from ldm.metrics.compare import accuracy_table
from ldm.metrics.tables import to_markdown
from ldm.metrics.lpips import pairwise_metrics
from ldm.toy.render import render_watermark
from ldm.toy.train import reconstruction_psnr, render_dataset
from ldm.config.models import load_model_config
from ldm.diffusion.sampling import generate_to_folder


def main() -> None:
    parser = cli.parser(__doc__)
    cli.add_model(parser)
    parser.add_argument("--save_path", type=Path, default=REPO_ROOT / "evaluation_folder" / "mini-sd", help="for the images")
    parser.add_argument("--held_out", type=cli.positive, default=1000, help="painted pictures for the autoencoder")
    cli.add_sampling(parser, samples=1)
    cli.add_device(parser)
    args = parser.parse_args()
    device = cli.parse_devices(args.device)[0]
    model = cli.load_model(args, device)
    cli.fill(args, load_model_config(model.base).sampling)
    own = load_model_config(model.base)
    if "world" not in own:
        raise ValueError(f"{args.model} was not made by train-mini-sd.py: pass --model a folder that it wrote")

    def draw(name: str) -> Path:
        cases, folder, start = read_prompt_csv(REPO_ROOT / "data" / f"{name}.csv"), args.save_path / name, time.perf_counter()
        drawn = generate_to_folder(model, cases, folder, model.generation_metadata, args.num_samples, args.ddim_steps, args.guidance_scale,
                                args.batch_size)
        if drawn:
            print(f"{name}: {drawn} images, {64 * (time.perf_counter() - start) / drawn:.1f} s for 64")
        return folder

    for category in ("style", "object"):
        classifier, recipe_of = load_classifier(classifier_path(category), device)
        table = accuracy_table(classifier, draw(f"{category}_classify"), category)
        print(to_markdown(table))
        print(f"mean {table.accuracy.mean():.2f} %, least {table.accuracy.min():.2f} %; the classifier itself: "
              f"{100 * recipe_of['accuracy']:.2f} % on held-out painted pictures\n")

    folder, rows = draw("watermark"), []
    for case in read_prompt_csv(REPO_ROOT / "data" / "watermark.csv"):
        if case.prompt:
            painted = args.save_path / "painted" / image_filename(case.number, 0)
            save_image(painted, Image.fromarray(render_watermark(case.prompt)))
            found = pairwise_metrics([painted], [folder / image_filename(case.number, 0)], device)
            rows.append((case.prompt, found["psnr"].item(), found["lpips"].item()))
    table = pd.DataFrame(rows, columns=["watermark", "psnr", "lpips"]).groupby("watermark", sort=False)
    print(to_markdown(table.agg(least_psnr=("psnr", "min"), mean_psnr=("psnr", "mean"), mean_lpips=("lpips", "mean")).reset_index()))

    painted, _ = render_dataset(args.held_out, own.seed + 1, own.world.shares)  # training's pictures are the seed's
    psnr = reconstruction_psnr(model.vae, painted)
    print(f"\nautoencoder on {args.held_out} held-out pictures: {psnr.mean():.2f} dB PSNR on average, "
          f"{-10 * (10 ** (-psnr / 10)).mean().log10():.2f} dB of all pixels together")


if __name__ == "__main__":
    cli.run(main)
