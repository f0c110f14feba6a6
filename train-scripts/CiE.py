"""Erase concepts by SRS-ME-double-dagger: SRS-ME's loss on all cross-attention weights, with no null space.

For what must never come back: nothing else is protected. Writes a dense weight shift per concept, for
--method SRS-ME-double-dagger of generate-images-merge.py and Merge_model.py.
"""

from ldm import cli


def main() -> None:
    parser = cli.parser(__doc__)
    cli.add_erasure(parser, "lr", "threshold", "reg_beta", "iter_break", "batch_size", "train_method")
    cli.erase(parser.parse_args(), "SRS-ME-double-dagger")


if __name__ == "__main__":
    cli.run(main)
