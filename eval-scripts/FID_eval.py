"""Frechet distance between two folders of images from the same prompts, for each concept and in all.

FID where --inception_path has the weights of its network; else the distance of AlexNet features, called fd_alexnet.
Writes it into --path2 as a CSV of that name.
"""

from pathlib import Path

import pandas as pd

from ldm import cli
from ldm.io.files import atomic_write
from ldm.metrics.compare import frechet_by_prompt, image_labels, match_images
from ldm.metrics.tables import to_markdown
from ldm.metrics.frechet import distance_column


def main() -> None:
    parser = cli.parser(__doc__)
    parser.add_argument("--path1", type=Path, required=True, help="images of the original model")
    parser.add_argument("--path2", type=Path, required=True, help="images of the changed model")
    cli.add_inception(parser)
    cli.add_device(parser)
    args = parser.parse_args()
    device, matched, name = cli.parse_devices(args.device)[0], match_images(args.path1, args.path2), distance_column(args.inception_path)
    prompts = image_labels(args.path2, [after for _, after in matched])
    found = frechet_by_prompt(matched, prompts, device, args.inception_path, whole=True)
    counts = pd.Series(prompts).value_counts().to_dict() | {"all": len(matched)}
    table = found.rename_axis("prompt").reset_index(name=name)
    table.insert(1, "images", table.prompt.map(counts))
    with atomic_write(args.path2 / f"{name}.csv") as partial:
        table.to_csv(partial, index=False)
    print(to_markdown(table))
    print(f"-> {args.path2 / f'{name}.csv'}")


if __name__ == "__main__":
    cli.run(main)
