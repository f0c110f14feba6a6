"""Erase concepts by ESD (Erased Stable Diffusion): the noise under "VanGogh painting" turns away from the concept.

It trains on latents that the edited model samples itself. Writes a dense weight shift per concept, for --method ESD of
generate-images-merge.py and Merge_model.py.
"""

from ldm.cli import arguments, concepts
from ldm.cli.run import run
from ldm.config.methods import ESDConfig


def main() -> None:
    parser = arguments.make_parser(__doc__)
    concepts.add_erasure(parser, ESDConfig)
    args = parser.parse_args()
    from ldm.cli import erasure

    erasure.run_erasure(args, ESDConfig.name)


if __name__ == "__main__":
    run(main)
