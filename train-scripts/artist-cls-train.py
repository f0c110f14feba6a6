"""Train the classifier of a category's concepts, ResNet18 over class 0 (empty) and one class for each concept.

Reads DATA_DIR/train/{0..9} and DATA_DIR/eval/{0..9}, which generate-data.py makes, and writes
CLASSIFIER_DIR/CATEGORY.safetensors. The classifiers of the synthetic dataset, models/classifiers, stay: for others give
--classifier to artist-cls-test.py, cate-cls-test.py, compare.py, scenes.py, the ablations or report.py.
"""

from pathlib import Path

from ldm.cli import arguments
from ldm.cli.run import run
from ldm.config.concepts import erasable_concepts
from ldm.io.paths import REPO_ROOT
from ldm.metrics.classifier_config import ClassifierConfig


def main() -> None:
    parser = arguments.make_parser(__doc__)
    arguments.add_category(parser)
    text = "has train and eval (default: data, or data/CATEGORY)"
    parser.option("data_dir", original=("--path",), type=Path, default=None, help=text)
    classifier_dir = REPO_ROOT / "models" / "own-classifiers"
    parser.option(
        "classifier_dir", original=("--model_path",), type=Path, default=classifier_dir, help="where to write"
    )
    text = "torchvision's ImageNet ResNet18 state dict to start from"
    parser.option("init_weights", type=Path, default=None, help=text)
    arguments.add_settings_with_defaults(parser, ClassifierConfig(), train_batch_size=("--batch_size",))
    arguments.add_device(parser)
    args = parser.parse_args()
    from ldm.cli.devices import parse_devices
    from ldm.io.files import file_digest
    from ldm.io.tensors import CREATED_BY, library_versions
    from ldm.metrics.classifier_training import train_classifier
    from ldm.metrics.classify import save_classifier

    config = ClassifierConfig(**arguments.typed_settings(args, ClassifierConfig))
    classes = ["empty", *(concept.name for concept in erasable_concepts(args.category))]
    data_dir = args.data_dir or arguments.default_data_dir(args.category)
    device = parse_devices(args.device)[0]
    classifier, accuracy = train_classifier(data_dir, classes, config, device, args.init_weights)
    path = args.classifier_dir / f"{args.category}.safetensors"
    metadata = {
        "created_by": CREATED_BY,
        "classes": classes,
        "accuracy": accuracy,
        "config": config.to_dict(),
        "init_weights": file_digest(args.init_weights) if args.init_weights else None,
        "data_digest": file_digest(data_dir),
        "versions": library_versions(),
    }
    save_classifier(classifier, path, metadata)
    print(f"accuracy on {data_dir / 'eval'}: {accuracy:.2%} -> {path}")


if __name__ == "__main__":
    run(main)
