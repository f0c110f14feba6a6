"""The paper's Figure 19: one concept erased while the null space protects more and more of the others.

Writes protected.csv, protected.md and the plot protected.png into SAVE_PATH/CATEGORY.
"""

from ldm import cli, cli_experiment
from ldm.experiments.ablations import Variant, run_ablation
from ldm.config.concepts import erasable_concepts, parse_erase_targets


def main() -> None:
    parser = cli.parser(__doc__)
    cli_experiment.add_ablation(parser, "0,2,4,6,8", "numbers of other concepts to protect")
    parser.set_defaults(erased_index="0")
    args = parser.parse_args()
    erased = [concept.index for concept in parse_erase_targets(args.erased_index, args.erase_cat)]
    others = [concept.index for concept in erasable_concepts(args.erase_cat) if concept.index not in erased]
    numbers = cli.parse_numbers(args.values)
    if not all(number in range(len(others) + 1) for number in numbers):
        raise ValueError(f"--values {args.values}: there are 0 to {len(others)} other concepts to protect")
    experiment = cli_experiment.experiment(args)
    given = cli_experiment.srs_me(args, experiment)
    variants = [Variant(number, given, [*erased, *others[:number]]) for number in map(int, numbers)]
    table = run_ablation(experiment, args.shifts_path, "protected", erased, variants)
    cli_experiment.finish(args, table, "status", "protected concepts", "protected")


if __name__ == "__main__":
    cli.run(main)
