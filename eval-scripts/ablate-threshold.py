"""The paper's Figure 21: how far the momentum of the correlation must fall before an erasure stops.

Writes threshold.csv, threshold.md and the plot threshold.png into SAVE_PATH/CATEGORY.
"""

from ldm import cli, cli_experiment


def main() -> None:
    parser = cli.parser(__doc__)
    cli_experiment.add_ablation(parser, "3e-2,1e-2,1e-3,1e-4", "thresholds to compare")
    cli_experiment.ablate(parser.parse_args(), "threshold", "threshold")


if __name__ == "__main__":
    cli.run(main)
