"""The paper's Figure 23: what erasing Cezanne does to concepts that resemble it, protected or not.

The category `similar` has Cezanne, Cezanne's painting, painting, cat and Picasso. Writes similar.csv, similar.md and
the plot similar.png into SAVE_PATH/CATEGORY.
"""

from ldm.cli import arguments
from ldm.cli.experiment import (
    add_experiment,
    add_targets,
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
    add_experiment(parser, "ablations")
    add_targets(parser, "0")
    parser.set_defaults(category="similar")
    args = parser.parse_args()
    erased = target_indexes(args)
    all_indexes = [concept.index for concept in erasable_concepts(args.category)]
    from ldm.experiments.ablations import Variant, run_ablation

    experiment = make_ablation(args)
    config = srsme_config(args, experiment)
    variants = [Variant("nothing else", config, erased), Variant("all others", config, all_indexes)]
    table = run_ablation(experiment, artifacts_dir(args), "similar", erased, variants)
    print_ablation(args, table, "similar", "prompt", "protected")


if __name__ == "__main__":
    run(main)
