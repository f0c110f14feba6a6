"""One picture and one table of several image folders from the same prompts: the first is the original model's.

Each prompt is a row, each folder a column. The table gives every prompt's status, its accuracy in each folder, and the
last folder's LPIPS, PSNR and largest pixel difference to the first.
"""

from pathlib import Path

import pandas as pd

from ldm import cli
from ldm.config.concepts import EMPTY_PROMPT_LABEL, STATUSES, concept_status, parse_indexes
from ldm.io.files import atomic_write, write_text
from ldm.io.image_grid import image_grid
from ldm.io.images import image_filename, open_image, save_image
from ldm.io.prompts import read_prompt_csv
from ldm.metrics.classify import classifier_path, load_classifier
from ldm.metrics.compare import _index_by_name, accuracy_by_prompt, compare, image_prompts, match_images
from ldm.metrics.tables import to_markdown


def main() -> None:
    parser = cli.parser(__doc__)
    cli.add_category(parser)
    parser.add_argument("--paths", type=Path, nargs="+", required=True, help="image folders, the original model's first")
    parser.add_argument("--titles", nargs="+", default=None, help="their titles (default: the folders' names)")
    parser.add_argument("--erased", default="", help="concepts erased in the last folder, such as 1,3")
    parser.add_argument("--restored", default="", help="concepts restored in the last folder, such as 2")
    parser.add_argument("--num", type=cli.positive, default=4, help="images in a cell of the picture")
    parser.add_argument("--zoom", type=cli.positive, default=1, help="how much larger to draw each image")
    parser.add_argument("--save_path", type=Path, required=True, help="the picture; the table goes beside it as .csv and .md")
    cli.add_device(parser)
    args = parser.parse_args()
    titles = args.titles or [path.name for path in args.paths]
    if len(titles) != len(args.paths) or len(titles) < 2:
        raise ValueError(f"{len(args.paths)} --paths and {len(titles)} --titles: give two or more, as many of both")
    erased, restored = (parse_indexes(text, args.erase_cat) for text in (args.erased, args.restored))
    device = cli.parse_devices(args.device)[0]
    classifier, _ = load_classifier(classifier_path(args.erase_cat), device,
                                    "train it with python train-scripts/artist-cls-train.py")
    prompts = args.paths[-1] / "prompts.csv"

    table = compare(args.paths[0], args.paths[-1], prompts, args.erase_cat, classifier, device).set_index("prompt")
    result = pd.DataFrame(index=table.index)

    result["status"] = [concept_status(args.erase_cat, prompt, erased, restored) for prompt in result.index]
    result[f"accuracy % {titles[0]}"] = table.accuracy_before
    for title, folder in zip(titles[1:-1], args.paths[1:-1]):
        images = [after for _, after in match_images(args.paths[0], folder)]
        result[f"accuracy % {title}"] = accuracy_by_prompt(classifier, images, image_prompts(images, prompts), args.erase_cat)
    result[f"accuracy % {titles[-1]}"] = table.accuracy_after
    result["LPIPS"], result["PSNR dB"] = table.lpips, table.psnr
    result["largest pixel difference"] = table.largest_pixel.astype(int)
    result = result.sort_values("status", key=lambda kinds: kinds.map(STATUSES.index), kind="stable")

    rows, places = [], [_index_by_name(path) for path in args.paths]
    for prompt, kind in zip(result.index, result.status):
        cases = [image_filename(case.number, 0) for case in read_prompt_csv(prompts) if case.prompt == prompt]
        names = [name for name in cases if all(name in images for images in places)][:args.num]
        rows.append((f"{prompt or EMPTY_PROMPT_LABEL} ({kind})", [[open_image(images[name]) for name in names] for images in places]))
    save_image(args.save_path, image_grid(rows, titles, args.zoom))
    result = result.rename(index={"": EMPTY_PROMPT_LABEL}).reset_index()
    text = to_markdown(result)
    with atomic_write(args.save_path.with_suffix(".csv")) as partial:
        result.to_csv(partial, index=False)
    write_text(args.save_path.with_suffix(".md"), text + "\n")
    print(text)
    print(f"-> {args.save_path}")


if __name__ == "__main__":
    cli.run(main)
