"""The paper's Figure 22: beta, the scale of the null space's basis.

Writes beta.csv, beta.md and the plot beta.png into SAVE_PATH/CATEGORY.
"""

from ldm import cli, cli_experiment


def main() -> None:
    parser = cli.parser(__doc__)
    cli_experiment.add_ablation(parser, "0.01,0.02,0.05,0.1,0.2", "scales to compare")
    cli_experiment.ablate(parser.parse_args(), "beta", "scale_factor")


if __name__ == "__main__":
    cli.run(main)
