"""Erase concepts by SRS-ME-double-dagger: SRS-ME's loss on all cross-attention weights, with no null space.

For what must never come back: nothing else is protected. Writes a dense weight shift per concept, for
--method SRS-ME-double-dagger of generate-images-merge.py and Merge_model.py.
"""

from ldm.cli import arguments, concepts
from ldm.cli.run import run
from ldm.config.methods import FullCorrelationConfig


def main() -> None:
    parser = arguments.make_parser(__doc__)
    concepts.add_erasure(parser, FullCorrelationConfig)
    args = parser.parse_args()
    from ldm.cli import erasure

    erasure.run_erasure(args, FullCorrelationConfig.name)


if __name__ == "__main__":
    run(main)
