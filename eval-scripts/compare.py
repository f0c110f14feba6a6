"""Before and after an erasure, image by image: accuracy, LPIPS, largest pixel difference, PSNR and Frechet distance for
each prompt.

Writes compare-PATH1.csv into --path2.
"""

from pathlib import Path

from ldm import cli
from ldm.io.files import atomic_write
from ldm.metrics.classify import classifier_path, load_classifier
from ldm.metrics.compare import compare
from ldm.metrics.tables import to_markdown


def main() -> None:
    parser = cli.parser(__doc__)
    cli.add_category(parser)
    parser.add_argument("--path1", type=Path, required=True, help="images of the original model")
    parser.add_argument("--path2", type=Path, required=True, help="images of the changed model")
    parser.add_argument("--prompts_path", type=Path, default=None, help="their prompt list (default: prompts.csv in path2)")
    parser.add_argument("--model_path", type=Path, default=None, help="default: models/classifiers/CATEGORY.safetensors")
    cli.add_inception(parser)
    cli.add_device(parser)
    args = parser.parse_args()
    device = cli.parse_devices(args.device)[0]
    path = args.model_path or classifier_path(args.erase_cat)
    classifier, _ = load_classifier(path, device, "train it with python train-scripts/artist-cls-train.py")
    table = compare(args.path1, args.path2, args.prompts_path or args.path2 / "prompts.csv", args.erase_cat, classifier,
                    device, args.inception_path)
    written = args.path2 / f"compare-{args.path1.resolve().name}.csv"
    with atomic_write(written) as partial:
        table.to_csv(partial, index=False)
    print(to_markdown(table))
    print(f"-> {written}")


if __name__ == "__main__":
    cli.run(main)
