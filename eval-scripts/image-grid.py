"""One grid and one table of several image folders from the same prompts: the first is the original model's.

Each prompt is a row, each folder a column. The table gives every prompt's status, its accuracy in each folder, and the
last folder's LPIPS, PSNR and largest pixel difference to the first.
"""

from pathlib import Path

from ldm.cli import arguments, habits, output
from ldm.cli.arguments import Namespace
from ldm.cli.concepts import add_statuses, named_statuses
from ldm.cli.run import run
from ldm.config.concepts import EMPTY_PROMPT_LABEL, STATUSES
from ldm.io.prompts import read_prompt_csv


def measure(args: Namespace, titles: list[str]):
    """Return the table, a row for each prompt, in order of status, and how many images a folder has.

    The table's index is the prompt.
    """
    import pandas as pd

    from ldm.cli.devices import parse_devices
    from ldm.metrics.classify import find_classifier
    from ldm.metrics.compare import accuracy_by_prompt, compare, image_prompts, match_images

    device = parse_devices(args.device)[0]
    original_dir, *between, edited_dir = args.image_dirs
    prompts = edited_dir / "prompts.csv"
    listed = dict.fromkeys(case.prompt for case in read_prompt_csv(prompts))
    statuses = named_statuses(args, edited_dir, listed)
    classifier = find_classifier(args.category, None, device)
    table = compare(original_dir, edited_dir, prompts, args.category, classifier, device).set_index("prompt")
    result = pd.DataFrame(index=table.index)
    result["status"] = [statuses[prompt] for prompt in result.index]
    result[f"accuracy % {titles[0]}"] = table.accuracy_before
    for title, folder in zip(titles[1:-1], between, strict=True):
        images = [image for _, image in match_images(original_dir, folder)]
        labels = image_prompts(images, prompts)
        result[f"accuracy % {title}"] = accuracy_by_prompt(classifier, images, labels, args.category)
    result[f"accuracy % {titles[-1]}"] = table.accuracy_after
    result["LPIPS"], result["PSNR dB"] = table.lpips, table.psnr
    result["largest pixel difference"] = table.max_abs_diff.astype(int)
    in_order = result.sort_values("status", key=lambda column: column.map(STATUSES.index), kind="stable")
    return in_order, table.images.sum()


def make_grid(args: Namespace, titles: list[str], table):
    """Return the image: for each row of the table a few images from each folder, the first of each case."""
    from ldm.io.image_grid import image_grid
    from ldm.io.images import list_images, open_image, parse_case_number

    cases = read_prompt_csv(args.image_dirs[-1] / "prompts.csv")
    folders = [{path.name: path for path in list_images(folder)} for folder in args.image_dirs]
    first_names: dict[int, str] = {}
    for name, path in folders[0].items():
        first_names.setdefault(parse_case_number(path), name)
    rows = []
    for prompt, status in zip(table.index, table.status, strict=True):
        numbers = [case.case_number for case in cases if case.prompt == prompt and case.case_number in first_names]
        names = [first_names[number] for number in numbers[: args.images_per_cell]]
        cells = [[open_image(images[name]) for name in names] for images in folders]
        rows.append((f"{prompt or EMPTY_PROMPT_LABEL} ({status})", cells))
    return image_grid(rows, titles, args.scale)


def main() -> None:
    parser = arguments.make_parser(__doc__)
    arguments.add_category(parser)
    parser.option("image_dirs", type=Path, nargs="+", required=True, help="image folders, the original model's first")
    parser.option("column_titles", nargs="+", default=None, help="their titles (default: the folders' names)")
    add_statuses(parser, "the last folder")
    parser.option("images_per_cell", type=arguments.positive_int, default=4, help="images in a cell of the grid")
    parser.option("scale", type=arguments.positive_int, default=1, help="how much larger each image is shown")
    parser.option("save_path", type=Path, required=True, help="the grid; the table goes beside it as .csv and .md")
    arguments.add_device(parser)
    habits.add_json(parser)
    args = parser.parse_args()
    titles = args.column_titles or [path.name for path in args.image_dirs]
    if len(titles) != len(args.image_dirs) or len(titles) < 2:
        counts = f"{len(args.image_dirs)} `image_dirs` and {len(titles)} `column_titles`"
        raise ValueError(f"{counts}: give two or more, as many of both")
    if len(set(titles)) < len(titles):
        raise ValueError("two columns have one title: give each its own by `column_titles`")
    from ldm.io.files import atomic_write, write_text
    from ldm.io.images import save_image
    from ldm.metrics.tables import to_markdown

    table, num_images = measure(args, titles)
    save_image(args.save_path, make_grid(args, titles, table))
    table = table.rename(index={"": EMPTY_PROMPT_LABEL}).reset_index()
    with atomic_write(args.save_path.with_suffix(".csv")) as partial:
        table.to_csv(partial, index=False)
    write_text(args.save_path.with_suffix(".md"), to_markdown(table) + "\n")
    output.show_table(table)
    print(f"{num_images} images in each folder -> {args.save_path}")


if __name__ == "__main__":
    run(main)
