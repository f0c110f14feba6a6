"""Erase concepts by SPEED: values of "VanGogh" become those of "art" in the null space of a refined retain set.

What --protect and --em_indexes name is the retain set, with the concepts erased together, each but in its own erasure.
Writes a dense weight shift per concept, for --method SPEED of generate-images-merge.py and Merge_model.py.
"""

from ldm.cli import arguments, concepts
from ldm.cli.run import run
from ldm.config.peers import SPEEDConfig


def main() -> None:
    parser = arguments.make_parser(__doc__)
    concepts.add_erasure(parser, SPEEDConfig)
    concepts.add_protection(parser)
    args = parser.parse_args()
    from ldm.cli import erasure

    erasure.run_erasure(args, SPEEDConfig.name)


if __name__ == "__main__":
    run(main)
