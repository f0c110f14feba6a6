"""Erase concepts by AbConcept (Ablating Concepts): the noise under "VanGogh painting" becomes that under "painting".

Writes a dense weight shift per concept, for --method AbConcept of generate-images-merge.py and Merge_model.py.
"""

from ldm import cli


def main() -> None:
    parser = cli.parser(__doc__)
    cli.add_erasure(parser, "lr", "iter_break", "batch_size", "train_method")
    cli.erase(parser.parse_args(), "AbConcept")


if __name__ == "__main__":
    cli.run(main)
