"""Compare images before and after an erasure: accuracy, LPIPS, pixels, PSNR and Frechet distance for each prompt.

Writes compare-NAME.csv into EDITED_DIR, NAME being that of the folder ORIGINAL_DIR.
"""

from ldm.cli import arguments
from ldm.cli.run import run


def main() -> None:
    parser = arguments.make_parser(__doc__)
    arguments.add_category(parser)
    arguments.add_image_pair(parser)
    arguments.add_image_prompts(parser)
    arguments.add_classifier(parser)
    arguments.add_inception(parser)
    arguments.add_device(parser)
    args = parser.parse_args()
    from ldm.cli.devices import parse_devices
    from ldm.io.files import atomic_write
    from ldm.metrics.classify import find_classifier
    from ldm.metrics.compare import compare
    from ldm.metrics.tables import to_markdown

    device = parse_devices(args.device)[0]
    table = compare(
        args.original_dir,
        args.edited_dir,
        args.prompts_path or args.edited_dir / "prompts.csv",
        args.category,
        find_classifier(args.category, args.classifier, device),
        device,
        args.inception_weights,
    )
    path = args.edited_dir / f"compare-{args.original_dir.resolve().name}.csv"
    with atomic_write(path) as partial:
        table.to_csv(partial, index=False)
    print(to_markdown(table))
    print(f"{table.images.sum()} pairs of images -> {path}")


if __name__ == "__main__":
    run(main)
