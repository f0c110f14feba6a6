"""How many of each concept's images a classifier takes for that concept, as a table.

The images are in class folders 0, 1, ... (train-scripts/move_image.py sorts them), or in one folder with prompts.csv.
"""

from pathlib import Path

from ldm import cli
from ldm.io.paths import REPO_ROOT
from ldm.metrics.classify import classifier_path, load_classifier
from ldm.metrics.compare import accuracy_table
from ldm.metrics.tables import to_markdown


def main() -> None:
    parser = cli.parser(__doc__)
    cli.add_category(parser)
    parser.add_argument("--path", type=Path, default=REPO_ROOT / "evaluation_folder" / "ori-merge", help="the images")
    parser.add_argument("--prompts_path", type=Path, default=None, help="their prompt list (default: prompts.csv there)")
    parser.add_argument("--model_path", type=Path, default=None, help="default: models/classifiers/CATEGORY.safetensors")
    cli.add_device(parser)
    args = parser.parse_args()
    path = args.model_path or classifier_path(args.erase_cat)
    classifier, _ = load_classifier(path, cli.parse_devices(args.device)[0],
                                    f"train it with python train-scripts/artist-cls-train.py --erase_cat {args.erase_cat}")
    table = accuracy_table(classifier, args.path, args.erase_cat, args.prompts_path)
    print(to_markdown(table))
    print(f"mean accuracy {table.accuracy.mean():.2f} %")


if __name__ == "__main__":
    cli.run(main)
