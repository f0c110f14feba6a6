"""Erase concepts by FMN (Forget-Me-Not): attention scores under "VanGogh painting" become those under "painting".

Writes a dense weight shift per concept, for --method FMN of generate-images-merge.py and Merge_model.py.
"""

from ldm.cli import arguments, concepts
from ldm.cli.run import run
from ldm.config.methods import ForgetMeNotConfig


def main() -> None:
    parser = arguments.make_parser(__doc__)
    concepts.add_erasure(parser, ForgetMeNotConfig)
    args = parser.parse_args()
    from ldm.cli import erasure

    erasure.run_erasure(args, ForgetMeNotConfig.name)


if __name__ == "__main__":
    run(main)
