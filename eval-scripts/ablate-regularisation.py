"""The paper's Table 4: erasure with and without the regularisation of |dW|_1.

Writes regularisation.csv, regularisation.md and the plot regularisation.png into SAVE_PATH/CATEGORY.
"""

from ldm.cli import arguments
from ldm.cli.experiment import add_ablation, run_sweep
from ldm.cli.run import run


def main() -> None:
    parser = arguments.make_parser(__doc__)
    add_ablation(parser, "0,1e-6,1e-5,1e-4", "weights of |dW|_1 to compare")
    run_sweep(parser.parse_args(), "regularisation", "l1_weight", allow_zero=True)


if __name__ == "__main__":
    run(main)
