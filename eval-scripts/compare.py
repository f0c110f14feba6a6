"""Compare images before and after an erasure: accuracy, LPIPS, pixels, PSNR and Frechet distance for each prompt.

Unchanged is the fraction of a prompt's images that differ from the original's by at most 1 of 255 in every pixel.
Writes compare-NAME.csv into EDITED_DIR, NAME being that of the folder ORIGINAL_DIR, and prints a summary by group. A
prompt's group is that of the first prompt list in --groups that has it; else compositions, or erased compositions, for
one that says a style and an object; else erased, restored, protected or regular.
"""

from pathlib import Path

from ldm.cli import arguments, habits, output
from ldm.cli.arguments import Namespace
from ldm.cli.concepts import add_statuses, named_statuses
from ldm.cli.run import run


def find_groups(args: Namespace, prompts_path: Path) -> dict[str, str]:
    """Return the group of each prompt that the images show."""
    from ldm.metrics.compare import image_prompts, match_images
    from ldm.metrics.statuses import prompt_groups

    edited_paths = [edited for _, edited in match_images(args.original_dir, args.edited_dir)]
    prompts = image_prompts(edited_paths, prompts_path)
    return prompt_groups(named_statuses(args, args.edited_dir, prompts), args.groups)


def main() -> None:
    parser = arguments.make_parser(__doc__)
    arguments.add_category(parser)
    arguments.add_image_pair(parser)
    arguments.add_image_prompts(parser)
    add_statuses(parser, "EDITED_DIR")
    text = "names for the prompts of further lists, such as captions=data/everyday_captions.csv"
    parser.option(
        "groups", type=arguments.named_file, nargs="+", action="extend", default=[], metavar="NAME=FILE", help=text
    )
    arguments.add_classifier(parser)
    arguments.add_inception(parser)
    arguments.add_device(parser)
    habits.add_json(parser)
    args = parser.parse_args()
    from ldm.cli.devices import parse_devices
    from ldm.io.files import atomic_write
    from ldm.metrics.classify import find_classifier
    from ldm.metrics.compare import compare, summarize_by

    device, prompts_path = parse_devices(args.device)[0], args.prompts_path or args.edited_dir / "prompts.csv"
    groups = find_groups(args, prompts_path)  # before the slow part, so that a mistake is told at once
    table = compare(
        args.original_dir,
        args.edited_dir,
        prompts_path,
        args.category,
        find_classifier(args.category, args.classifier, device),
        device,
        args.inception_weights,
    )
    table.insert(1, "group", [groups[prompt] for prompt in table.prompt])
    path = args.edited_dir / f"compare-{args.original_dir.resolve().name}.csv"
    with atomic_write(path) as partial:
        table.to_csv(partial, index=False)
    output.show_table(table, "prompts")
    output.show_table(summarize_by(table, "group"), "groups")
    print(f"{table.images.sum()} pairs of images -> {path}")


if __name__ == "__main__":
    run(main)
