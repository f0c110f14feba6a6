"""Sort a folder of generated images into class folders 0, 1, ..., one for each concept, for the classifier scripts.

The concept is the one that the image's prompt names (prompts.csv in the folder), for any number of images; without
prompts.csv, --cases_per_concept cases belong to each concept in turn. What is sorted already stays, and so do images
of no concept.
"""

from pathlib import Path

from ldm.cli import arguments
from ldm.cli.run import run
from ldm.config.concepts import erasable_concepts, match_concept


def main() -> None:
    parser = arguments.make_parser(__doc__)
    arguments.add_category(parser)
    arguments.add_image_dir(parser)
    text = "case numbers of each concept, where there is no prompts.csv"
    parser.option("cases_per_concept", type=arguments.positive_int, default=50, help=text)
    args = parser.parse_args()
    from ldm.io.images import is_image, list_images, parse_case_number
    from ldm.io.prompts import read_prompt_csv

    list_images(args.image_dir)
    prompts_path = args.image_dir / "prompts.csv"
    prompts = None
    if prompts_path.is_file():
        prompts = {case.case_number: case.prompt for case in read_prompt_csv(prompts_path)}
    last_index = erasable_concepts(args.category)[-1].index
    targets: dict[Path, Path] = {}
    counts: dict[int, int] = {}
    num_left = 0
    for path in sorted(path for path in args.image_dir.iterdir() if is_image(path) and path.is_file()):
        case_number = parse_case_number(path)
        label = case_number // args.cases_per_concept
        if prompts is not None:
            if case_number not in prompts:
                raise ValueError(
                    f"{prompts_path} has no case {case_number}, which {path} shows: see which list is its own"
                )
            concept = match_concept(args.category, prompts[case_number])
            label = concept.index if concept else last_index + 1
        if label > last_index:
            num_left += 1
            continue
        targets[path] = args.image_dir / str(label) / path.name
        counts[label] = counts.get(label, 0) + 1
    for path, target in targets.items():  # before any is moved
        if target.exists():
            raise ValueError(f"{path} would replace {target}, which is there already: remove one of them")
        if target.parent.exists() and not target.parent.is_dir():
            raise ValueError(f"{target.parent} is no folder: remove it, since the images of its class go there")
    for target in targets.values():
        target.parent.mkdir(exist_ok=True)
    for path, target in targets.items():
        path.replace(target)
    for label, count in sorted(counts.items()):
        print(f"{args.image_dir / str(label)}: {count} images")
    print(f"{sum(counts.values())} images sorted, {num_left} of no {args.category} concept left where they were")


if __name__ == "__main__":
    run(main)
