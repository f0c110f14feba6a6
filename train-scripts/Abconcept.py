"""Erase concepts by AbConcept (Ablating Concepts): the noise under "VanGogh painting" becomes that under "painting".

Writes a dense weight shift per concept, for --method AbConcept of generate-images-merge.py and Merge_model.py.
"""

from ldm.cli import arguments, concepts
from ldm.cli.run import run
from ldm.config.methods import AblatingConceptsConfig


def main() -> None:
    parser = arguments.make_parser(__doc__)
    concepts.add_erasure(parser, AblatingConceptsConfig)
    args = parser.parse_args()
    from ldm.cli import erasure

    erasure.run_erasure(args, AblatingConceptsConfig.name)


if __name__ == "__main__":
    run(main)
