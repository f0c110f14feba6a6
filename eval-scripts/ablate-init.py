"""The closed form against learning: concepts erased by the closed form, by gradient from zero, and by gradient from the closed form.

Beside accuracies and distances on bare names it measures held-out templates, and what an erased prompt draws instead: `world`
is the Frechet distance of the erased prompts' pictures to painted ones that show no concept of the category; the original model's
own pictures without a concept, of the blank prompt, are the row to compare with. Writes init.csv and init.md into
SAVE_PATH/CATEGORY.
"""

from ldm import ablation, cli, cli_experiment
from ldm.config.concepts import parse_erase_targets


def main() -> None:
    parser = cli.parser(__doc__)
    cli_experiment.add_experiment(parser, "ablations")
    parser.add_argument("--erased_index", default="0,1,2", help="concepts to erase and merge, such as 0,1,2")
    parser.add_argument("--num_painted", type=cli.positive, default=500, help="painted pictures that show no concept")
    args = parser.parse_args()
    concepts = parse_erase_targets(args.erased_index, args.erase_cat)
    tried = cli_experiment.experiment(args)
    tried.folder, tried.held_out = tried.folder / "init", True
    table, means = ablation.compare_starts(tried, args.shifts_path, [concept.index for concept in concepts],
                                           cli_experiment.srs_me(args, tried), cli_experiment.steps(args, tried), args.num_painted)
    path = args.save_path / args.erase_cat / "init"
    print(f"{', '.join(concept.name for concept in concepts)}:\n{ablation.save(table, means, path)}\n-> {path}.md, .csv")


if __name__ == "__main__":
    cli.run(main)
