"""Frechet distance between two folders of images from the same prompts, for each concept and in all.

It is FID where --inception_weights has the weights of its network; else the distance of AlexNet features, called
fd_alexnet. Writes it into EDITED_DIR as a CSV of that name.
"""

from ldm.cli import arguments, habits, output
from ldm.cli.run import run


def main() -> None:
    parser = arguments.make_parser(__doc__)
    arguments.add_image_pair(parser)
    arguments.add_inception(parser)
    arguments.add_device(parser)
    habits.add_json(parser)
    args = parser.parse_args()
    from ldm.cli.devices import parse_devices
    from ldm.io.errors import notify
    from ldm.io.files import atomic_write
    from ldm.metrics.compare import frechet_by_prompt, image_labels, match_images
    from ldm.metrics.frechet import distance_column

    device = parse_devices(args.device)[0]
    matched = match_images(args.original_dir, args.edited_dir)
    if len(matched) < 2:
        raise ValueError(f"{args.edited_dir} has one image, and a Frechet distance needs two or more: generate more")
    name = distance_column(args.inception_weights)
    labels = image_labels(args.edited_dir, [edited for _, edited in matched])
    distances = frechet_by_prompt(matched, labels, device, args.inception_weights, include_all=True)
    table = distances.rename_axis("prompt").reset_index(name=name)
    table.insert(1, "images", [*map(labels.count, dict.fromkeys(labels)), len(matched)])
    if (table.images < 2).any():
        notify(f"a Frechet distance needs two images or more: prompts with one in {args.edited_dir} have none")
    path = args.edited_dir / f"{name}.csv"
    with atomic_write(path) as partial:
        table.to_csv(partial, index=False)
    output.show_table(table)
    print(f"{len(matched)} pairs of images -> {path}")


if __name__ == "__main__":
    run(main)
