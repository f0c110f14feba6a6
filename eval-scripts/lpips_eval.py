"""LPIPS (AlexNet) between images of the same name in two folders, for each concept and in all.

Writes lpips.csv into --path2.
"""

from pathlib import Path

import pandas as pd

from ldm import cli
from ldm.io.files import atomic_write
from ldm.metrics.compare import image_labels, match_images
from ldm.metrics.tables import to_markdown
from ldm.metrics.lpips import pairwise_metrics


def main() -> None:
    parser = cli.parser(__doc__)
    parser.add_argument("--path1", type=Path, required=True, help="images of the original model")
    parser.add_argument("--path2", type=Path, required=True, help="images of the changed model")
    parser.add_argument("--image_size", type=cli.positive, default=None, help="scale the images to it first")
    cli.add_device(parser)
    args = parser.parse_args()
    matched = match_images(args.path1, args.path2)
    found = pairwise_metrics([a for a, _ in matched], [b for _, b in matched], cli.parse_devices(args.device)[0], args.image_size)
    images = [b for _, b in matched]
    table = pd.DataFrame({"image": [path.name for path in images], "prompt": image_labels(args.path2, images),
                          "lpips": found["lpips"].numpy()})
    with atomic_write(args.path2 / "lpips.csv") as partial:
        table.to_csv(partial, index=False)
    print(to_markdown(table.groupby("prompt", sort=False).lpips.agg(["size", "mean"]).reset_index()))
    print(f"mean LPIPS {table.lpips.mean():.6f} over {len(table)} pairs -> {args.path2 / 'lpips.csv'}")


if __name__ == "__main__":
    cli.run(main)
