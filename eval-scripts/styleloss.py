"""Measure how far images of the same name in two folders differ in style, by Gram matrices of AlexNet's features.

Prints the mean for each concept and in all, and writes style.csv into EDITED_DIR.
"""

from ldm.cli import arguments, habits, output
from ldm.cli.run import run


def main() -> None:
    parser = arguments.make_parser(__doc__)
    arguments.add_image_pair(parser)
    arguments.add_device(parser)
    habits.add_json(parser)
    args = parser.parse_args()
    import pandas as pd

    from ldm.cli.devices import parse_devices
    from ldm.io.files import atomic_write
    from ldm.metrics.compare import image_labels, match_images
    from ldm.metrics.style import style_distances

    matched = match_images(args.original_dir, args.edited_dir)
    originals, images = [original for original, _ in matched], [edited for _, edited in matched]
    distances = style_distances(originals, images, parse_devices(args.device)[0])
    table = pd.DataFrame(
        {
            "image": [path.name for path in images],
            "prompt": image_labels(args.edited_dir, images),
            "style": distances.numpy(),
        }
    )
    path = args.edited_dir / "style.csv"
    with atomic_write(path) as partial:
        table.to_csv(partial, index=False)
    output.show_table(table.groupby("prompt", sort=False)["style"].agg(["size", "mean"]).reset_index())
    print(f"mean style distance {table['style'].mean():.6f} over {len(table)} pairs -> {path}")


if __name__ == "__main__":
    run(main)
