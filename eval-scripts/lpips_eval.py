"""LPIPS (AlexNet) between images of the same name in two folders, for each concept and in all.

Writes lpips.csv into EDITED_DIR.
"""

from ldm.cli import arguments, habits, output
from ldm.cli.run import run


def main() -> None:
    parser = arguments.make_parser(__doc__)
    arguments.add_image_pair(parser)
    parser.option("image_size", type=arguments.positive_int, default=None, help="scale the images to it first")
    arguments.add_device(parser)
    habits.add_json(parser)
    args = parser.parse_args()
    import pandas as pd

    from ldm.cli.devices import parse_devices
    from ldm.io.files import atomic_write
    from ldm.metrics.compare import image_labels, match_images
    from ldm.metrics.lpips import pairwise_metrics

    matched = match_images(args.original_dir, args.edited_dir)
    originals, images = [original for original, _ in matched], [edited for _, edited in matched]
    metrics = pairwise_metrics(originals, images, parse_devices(args.device)[0], args.image_size)
    table = pd.DataFrame(
        {
            "image": [path.name for path in images],
            "prompt": image_labels(args.edited_dir, images),
            "lpips": metrics["lpips"].numpy(),
        }
    )
    path = args.edited_dir / "lpips.csv"
    with atomic_write(path) as partial:
        table.to_csv(partial, index=False)
    output.show_table(table.groupby("prompt", sort=False).lpips.agg(["size", "mean"]).reset_index())
    print(f"mean LPIPS {table.lpips.mean():.6f} over {len(table)} pairs -> {path}")


if __name__ == "__main__":
    run(main)
