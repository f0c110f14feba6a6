"""The paper's Figure 22: beta, the scale of the null space's basis.

Writes beta.csv, beta.md and the plot beta.png into SAVE_PATH/CATEGORY.
"""

from ldm.cli import arguments
from ldm.cli.experiment import add_ablation, run_sweep
from ldm.cli.run import run


def main() -> None:
    parser = arguments.make_parser(__doc__)
    add_ablation(parser, "0.01,0.02,0.05,0.1,0.2", "scales to compare")
    run_sweep(parser.parse_args(), "beta", "basis_scale")


if __name__ == "__main__":
    run(main)
