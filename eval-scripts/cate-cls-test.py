"""How many of each object's images a classifier takes for that object, as a table.

It is the object classifier of artist-cls-train.py, or, with --imagenet_weights, torchvision's ImageNet ResNet50 and the
paper's classes (491, 497, 571, 0, 569, 217, 574, 701, 566), as for Stable Diffusion.
"""

from ldm.cli import arguments, habits, output
from ldm.cli.run import run


def main() -> None:
    parser = arguments.make_parser(__doc__)
    arguments.add_image_dir(parser)
    arguments.add_image_prompts(parser)
    arguments.add_classifier(parser)
    arguments.add_imagenet(parser)
    arguments.add_device(parser)
    parser.set_defaults(category="object")
    habits.add_json(parser)
    args = parser.parse_args()
    from ldm.cli.devices import parse_devices
    from ldm.metrics.classify import ImageNetObjects, classifier_path, load_classifier
    from ldm.metrics.compare import accuracy_table, describe_accuracy

    device = parse_devices(args.device)[0]
    if args.imagenet_weights:
        classifier = ImageNetObjects(args.imagenet_weights).to(device)
    else:
        classifier, _ = load_classifier(args.classifier or classifier_path(args.category), device)
    table = accuracy_table(classifier, args.image_dir, args.category, args.prompts_path)
    output.show_table(table)
    print(describe_accuracy(table))


if __name__ == "__main__":
    run(main)
