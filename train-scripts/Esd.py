"""Erase concepts by ESD (Erased Stable Diffusion): the noise under "VanGogh painting" turns away from the concept.

It trains on latents that the changing model draws itself. Writes a dense weight shift per concept, for --method ESD of
generate-images-merge.py and Merge_model.py.
"""

from ldm import cli


def main() -> None:
    parser = cli.parser(__doc__)
    cli.add_erasure(parser, "lr", "iter_break", "batch_size", "train_method", "start_guidance", "negative_guidance", "ddim_steps")
    cli.erase(parser.parse_args(), "ESD")


if __name__ == "__main__":
    cli.run(main)
