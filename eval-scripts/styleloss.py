"""How far images of the same name in two folders differ in style (Gram matrices of AlexNet), for each concept and in all.

Writes style.csv into --path2.
"""

from pathlib import Path

import pandas as pd

from ldm import cli
from ldm.io.files import atomic_write
from ldm.metrics.compare import image_labels, match_images
from ldm.metrics.tables import to_markdown
from ldm.metrics.style import style_distances


def main() -> None:
    parser = cli.parser(__doc__)
    parser.add_argument("--path1", type=Path, required=True, help="images of the original model")
    parser.add_argument("--path2", type=Path, required=True, help="images of the changed model")
    cli.add_device(parser)
    args = parser.parse_args()
    matched = match_images(args.path1, args.path2)
    images = [after for _, after in matched]
    found = style_distances([before for before, _ in matched], images, cli.parse_devices(args.device)[0])
    table = pd.DataFrame({"image": [path.name for path in images], "prompt": image_labels(args.path2, images),
                          "style": found.numpy()})
    with atomic_write(args.path2 / "style.csv") as partial:
        table.to_csv(partial, index=False)
    print(to_markdown(table.groupby("prompt", sort=False)["style"].agg(["size", "mean"]).reset_index()))
    print(f"mean style distance {table['style'].mean():.6f} over {len(table)} pairs -> {args.path2 / 'style.csv'}")


if __name__ == "__main__":
    cli.run(main)
