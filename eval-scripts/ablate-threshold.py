"""The paper's Figure 21: how far the momentum of the correlation must fall before an erasure stops.

Writes threshold.csv, threshold.md and the plot threshold.png into SAVE_PATH/CATEGORY.
"""

from ldm.cli import arguments
from ldm.cli.experiment import add_ablation, run_sweep
from ldm.cli.run import run


def main() -> None:
    parser = arguments.make_parser(__doc__)
    add_ablation(parser, "3e-2,1e-2,1e-3,1e-4", "thresholds to compare")
    run_sweep(parser.parse_args(), "threshold", "stop_threshold")


if __name__ == "__main__":
    run(main)
