"""How many of each object's images a classifier takes for that object, as a table.

By the object classifier of artist-cls-train.py, or, with --imagenet_path, by torchvision's ImageNet ResNet50 and the
paper's classes (491, 497, 571, 0, 569, 217, 574, 701, 566), as for Stable Diffusion.
"""

from pathlib import Path

from ldm import cli
from ldm.io.paths import REPO_ROOT
from ldm.metrics.classify import ImageNetObjects, classifier_path, load_classifier
from ldm.metrics.compare import accuracy_table
from ldm.metrics.tables import to_markdown


def main() -> None:
    parser = cli.parser(__doc__)
    parser.add_argument("--path", type=Path, default=REPO_ROOT / "evaluation_folder" / "ori-merge", help="the images")
    parser.add_argument("--prompts_path", type=Path, default=None, help="their prompt list (default: prompts.csv there)")
    parser.add_argument("--model_path", type=Path, default=classifier_path("object"))
    parser.add_argument("--imagenet_path", type=Path, default=None, help="a state dict of torchvision's ResNet50")
    cli.add_device(parser)
    args = parser.parse_args()
    device = cli.parse_devices(args.device)[0]
    if args.imagenet_path:
        classifier = ImageNetObjects(args.imagenet_path).to(device)
    else:
        classifier, _ = load_classifier(args.model_path, device, "train it with python train-scripts/artist-cls-train.py "
                                        "--erase_cat object, or pass --imagenet_path")
    table = accuracy_table(classifier, args.path, "object", args.prompts_path)
    print(to_markdown(table))
    print(f"mean accuracy {table.accuracy.mean():.2f} %")


if __name__ == "__main__":
    cli.run(main)
