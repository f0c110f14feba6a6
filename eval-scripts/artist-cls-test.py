"""How many of each concept's images a classifier takes for that concept, as a table.

The images are in class folders 0, 1, ... (train-scripts/move_image.py sorts them), or in one folder with prompts.csv.
"""

from ldm.cli import arguments, habits, output
from ldm.cli.run import run


def main() -> None:
    parser = arguments.make_parser(__doc__)
    arguments.add_category(parser)
    arguments.add_image_dir(parser)
    arguments.add_image_prompts(parser)
    arguments.add_classifier(parser)
    arguments.add_device(parser)
    habits.add_json(parser)
    args = parser.parse_args()
    from ldm.cli.devices import parse_devices
    from ldm.metrics.classify import classifier_path, load_classifier
    from ldm.metrics.compare import accuracy_table, describe_accuracy

    path = args.classifier or classifier_path(args.category)
    classifier, _ = load_classifier(path, parse_devices(args.device)[0])
    table = accuracy_table(classifier, args.image_dir, args.category, args.prompts_path)
    output.show_table(table)
    print(describe_accuracy(table))


if __name__ == "__main__":
    run(main)
