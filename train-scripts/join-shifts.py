"""Put the shifts of one concept that were made on several text encoders into one file, which then acts in all of them.

A model takes of such a file what was made on its own text encoders, and says which of its streams stay unchanged.
"""

from pathlib import Path

from ldm.cli import arguments, habits, output
from ldm.cli.run import run


def main() -> None:
    parser = arguments.make_parser(__doc__)
    parser.add_argument("files", nargs="+", type=Path, help="shifts of one concept")
    parser.option("save_path", type=Path, required=True, help="the new file")
    habits.add_json(parser)
    args = parser.parse_args()
    from ldm.erasure.export_shift import join_shifts

    output.show_table(join_shifts(args.files, args.save_path), title=f"{args.save_path}:")


if __name__ == "__main__":
    run(main)
