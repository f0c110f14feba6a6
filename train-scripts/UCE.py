"""Erase concepts by UCE (Unified Concept Editing): keys and values of "VanGogh" become those of "art", in closed form.

What --protect and --em_indexes name is preserved, and so are the concepts erased together, each but in its own erasure.
Writes a dense weight shift per concept, for --method UCE of generate-images-merge.py and Merge_model.py.
"""

from ldm.cli import arguments, concepts
from ldm.cli.run import run
from ldm.config.peers import UCEConfig


def main() -> None:
    parser = arguments.make_parser(__doc__)
    concepts.add_erasure(parser, UCEConfig)
    concepts.add_protection(parser)
    args = parser.parse_args()
    from ldm.cli import erasure

    erasure.run_erasure(args, UCEConfig.name)


if __name__ == "__main__":
    run(main)
