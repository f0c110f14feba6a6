"""The paper's Figure 23: what erasing Cezanne does to concepts that resemble it, protected or not.

The category `similar` has Cezanne, Cezanne's painting, painting, cat and Picasso. Writes similar.csv, similar.md and the plot
similar.png into SAVE_PATH/CATEGORY.
"""

from ldm import cli, cli_experiment
from ldm.experiments.ablations import Variant, run_ablation
from ldm.config.concepts import erasable_concepts, parse_erase_targets


def main() -> None:
    parser = cli.parser(__doc__)
    cli_experiment.add_experiment(parser, "ablations")
    parser.set_defaults(erase_cat="similar")
    parser.add_argument("--erased_index", default="0", help="concepts to erase and merge, such as 0")
    args = parser.parse_args()
    erased = [concept.index for concept in parse_erase_targets(args.erased_index, args.erase_cat)]
    everything = [concept.index for concept in erasable_concepts(args.erase_cat)]
    experiment = cli_experiment.experiment(args)
    given = cli_experiment.srs_me(args, experiment)
    variants = [Variant("nothing else", given, erased), Variant("all others", given, everything)]
    table = run_ablation(experiment, args.shifts_path, "similar", erased, variants)
    cli_experiment.finish(args, table, "prompt", "protected", "similar")


if __name__ == "__main__":
    cli.run(main)
