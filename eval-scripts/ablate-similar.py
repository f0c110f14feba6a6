"""The paper's Figure 23: what erasing Cezanne does to concepts that resemble it, protected or not.

The category `similar` has Cezanne, Cezanne's painting, painting, cat and Picasso. Writes similar.csv, similar.md and the plot
similar.png into SAVE_PATH/CATEGORY.
"""

from ldm import cli, cli_experiment
from ldm.ablation import Variant, ablate
from ldm.concepts import erasable, parse_erased


def main() -> None:
    parser = cli.parser(__doc__)
    cli_experiment.add_experiment(parser, "ablations")
    parser.set_defaults(erase_cat="similar")
    parser.add_argument("--erased_index", default="0", help="concepts to erase and merge, such as 0")
    args = parser.parse_args()
    erased = [concept.index for concept in parse_erased(args.erased_index, args.erase_cat)]
    everything = [concept.index for concept in erasable(args.erase_cat)]
    experiment = cli_experiment.experiment(args)
    given = cli_experiment.srs_me(args, experiment)
    variants = [Variant("nothing else", given, erased), Variant("all others", given, everything)]
    table = ablate(experiment, args.shifts_path, "similar", erased, variants)
    cli_experiment.finish(args, table, "prompt", "protected", "similar")


if __name__ == "__main__":
    cli.run(main)
