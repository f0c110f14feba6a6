"""Sort a folder of generated images into class folders 0, 1, ..., one for each concept, for the classifier scripts.

The concept is the one that the image's prompt names (prompts.csv in the folder), for any number of images; without
prompts.csv, --cases_per_concept cases belong to each concept in turn. What is sorted already stays.
"""

from ldm.cli import arguments
from ldm.cli.run import run
from ldm.config.concepts import match_concept


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
    concepts = {}
    if prompts_path.is_file():
        for case in read_prompt_csv(prompts_path):
            concepts[case.case_number] = match_concept(args.category, case.prompt)
    counts: dict[int, int] = {}
    num_left = 0
    for path in sorted(filter(is_image, args.image_dir.iterdir())):
        case_number = parse_case_number(path)
        concept = concepts.get(case_number)
        if concepts and (concept is None or concept.is_watermark):
            num_left += 1
            continue
        label = concept.index if concept else case_number // args.cases_per_concept
        target = args.image_dir / str(label) / path.name
        target.parent.mkdir(exist_ok=True)
        path.replace(target)
        counts[label] = counts.get(label, 0) + 1
    for label, count in sorted(counts.items()):
        print(f"{args.image_dir / str(label)}: {count} images")
    print(f"{sum(counts.values())} images sorted, {num_left} of no {args.category} concept left where they were")


if __name__ == "__main__":
    run(main)
