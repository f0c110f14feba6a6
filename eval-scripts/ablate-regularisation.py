"""The paper's Table 4: erasure with and without the regularisation of |dW|_1.

Writes regularisation.csv, regularisation.md and the plot regularisation.png into SAVE_PATH/CATEGORY.
"""

from ldm import cli, cli_experiment


def main() -> None:
    parser = cli.parser(__doc__)
    cli_experiment.add_ablation(parser, "0,1e-6,1e-5,1e-4", "weights of |dW|_1 to compare")
    cli_experiment.ablate(parser.parse_args(), "regularisation", "reg_beta", zero=True)


if __name__ == "__main__":
    cli.run(main)
