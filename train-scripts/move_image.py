"""Sort a folder of generated images into class folders 0, 1, ..., one for each concept, for the classifier scripts.

The concept is the one that the image's prompt names (prompts.csv in the folder), for any number of images; without
prompts.csv, cases are counted off --num a concept. What is sorted already stays.
"""

from pathlib import Path

from ldm import cli
from ldm.config.concepts import match_concept
from ldm.io.paths import REPO_ROOT
from ldm.io.images import is_image, list_images, parse_case_number
from ldm.io.prompts import read_prompt_csv


def main() -> None:
    parser = cli.parser(__doc__)
    cli.add_category(parser)
    parser.add_argument("--path", type=Path, default=REPO_ROOT / "evaluation_folder" / "ori-merge", help="the images")
    parser.add_argument("--num", type=cli.positive, default=50, help="cases a concept, where there is no prompts.csv")
    args = parser.parse_args()
    list_images(args.path, "make it with python eval-scripts/generate-images-merge.py")
    prompts, known = args.path / "prompts.csv", {}
    if prompts.is_file():
        known = {case.number: match_concept(args.erase_cat, case.prompt) for case in read_prompt_csv(prompts)}
    moved, left = {}, 0
    for path in sorted(filter(is_image, args.path.iterdir())):
        case = parse_case_number(path)
        concept = known.get(case) if known else None
        label = concept.index if concept else case // args.num
        if known and (concept is None or concept.watermark):
            left += 1
            continue
        target = args.path / str(label) / path.name
        target.parent.mkdir(exist_ok=True)
        path.replace(target)
        moved[label] = moved.get(label, 0) + 1
    for label, count in sorted(moved.items()):
        print(f"{args.path / str(label)}: {count} images")
    print(f"{sum(moved.values())} images sorted, {left} of no {args.erase_cat} concept left where they were")


if __name__ == "__main__":
    cli.run(main)
