"""The paper's Figure 19: one concept erased while the null space protects more and more of the others.

Writes protected.csv, protected.md and the plot protected.png into SAVE_PATH/CATEGORY.
"""

from ldm.cli import arguments
from ldm.cli.experiment import (
    add_ablation,
    artifacts_dir,
    make_ablation,
    print_ablation,
    srsme_config,
    target_indexes,
)
from ldm.cli.run import run
from ldm.config.concepts import erasable_concepts


def main() -> None:
    parser = arguments.make_parser(__doc__)
    add_ablation(parser, "0,2,4,6,8", "numbers of other concepts to protect")
    parser.set_defaults(erased_index="0")
    args = parser.parse_args()
    erased = target_indexes(args)
    others = [concept.index for concept in erasable_concepts(args.category) if concept.index not in erased]
    numbers = arguments.parse_numbers(args.sweep_values, "sweep_values")
    if not all(number in range(len(others) + 1) for number in numbers):
        raise ValueError(f"`sweep_values` {args.sweep_values}: there are 0 to {len(others)} other concepts to protect")
    from ldm.experiments.ablations import Variant, run_ablation

    experiment = make_ablation(args)
    config = srsme_config(args, experiment)
    variants = [Variant(number, config, [*erased, *others[:number]]) for number in map(int, numbers)]
    table = run_ablation(experiment, artifacts_dir(args), "protected", erased, variants)
    print_ablation(args, table, "protected", "status", "protected concepts")


if __name__ == "__main__":
    run(main)
