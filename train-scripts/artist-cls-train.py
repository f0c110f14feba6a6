"""Train the classifier of a category's concepts, ResNet18 over class 0 (blank) and one class for each concept.

Reads DATA/train/{0..9} and DATA/eval/{0..9}, which generate-data.py makes, and writes MODEL_PATH/CATEGORY.safetensors. The
classifiers of the embedded model's world, models/classifiers, stay; --model_path of the scripts that count names others.
"""

from pathlib import Path

from ldm import cli
from ldm.io.files import file_digest
from ldm.io.tensors import library_versions
from ldm.config.concepts import erasable_concepts
from ldm.io.paths import REPO_ROOT
from ldm.metrics.classify import save_classifier, train_classifier


def main() -> None:
    parser = cli.parser(__doc__)
    cli.add_category(parser)
    parser.add_argument("--path", type=Path, default=None, help="has train and eval (default: data, or data/CATEGORY)")
    parser.add_argument("--model_path", type=Path, default=REPO_ROOT / "models" / "own-classifiers", help="where to write")
    parser.add_argument("--weights", type=Path, default=None, help="torchvision's ImageNet ResNet18 state dict to start from")
    parser.add_argument("--image_size", type=cli.positive, default=64)
    parser.add_argument("--batch_size", type=cli.positive, default=64)
    parser.add_argument("--epochs", type=cli.positive, default=3)
    parser.add_argument("--lr-max", type=float, default=0.05, help="peak of the cyclic rate")
    parser.add_argument("--seed", type=int, default=0)
    cli.add_device(parser)
    args = parser.parse_args()
    device = cli.parse_devices(args.device)[0]
    names = ["blank", *(concept.name for concept in erasable_concepts(args.erase_cat))]
    data = args.path or cli.default_data(args.erase_cat)
    classifier, accuracy = train_classifier(data, names, args.image_size, args.epochs, args.batch_size, args.lr_max,
                                            device, args.weights, args.seed)
    path = args.model_path / f"{args.erase_cat}.safetensors"
    save_classifier(classifier, path, {
        "made_by": "artist-cls-train.py", "classes": names, "accuracy": accuracy, "epochs": args.epochs, "lr": args.lr_max,
        "batch_size": args.batch_size, "seed": args.seed, "weights": args.weights and file_digest(args.weights),
        "data_digest": file_digest(data), "versions": library_versions()})
    print(f"accuracy on {data / 'eval'}: {accuracy:.2%} -> {path}")


if __name__ == "__main__":
    cli.run(main)
