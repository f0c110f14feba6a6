"""Erase concepts by FMN (Forget-Me-Not): attention scores under "VanGogh painting" become those under "painting".

Writes a dense weight shift per concept, for --method FMN of generate-images-merge.py and Merge_model.py.
"""

from ldm import cli


def main() -> None:
    parser = cli.parser(__doc__)
    cli.add_erasure(parser, "lr", "iter_break", "batch_size", "train_method")
    cli.erase(parser.parse_args(), "FMN")


if __name__ == "__main__":
    cli.run(main)
