"""Erase concepts by SRS-ME: learn, for each, a weight shift inside the null space that SRSME_Solution.py found.

Writes shift-INDEX.safetensors and its curve shift-INDEX.csv. The base model is never changed; merge shifts with
generate-images-merge.py or Merge_model.py, and restore a concept by leaving its shift out. --joint learns all of them at
once, their losses balanced (SRS-ME-dagger). --plan prints how much memory each choice of --dtype and
--gradient_checkpointing will take, and ends.
"""

from ldm import cli
from ldm.metrics.tables import to_markdown


def main() -> None:
    parser = cli.parser(__doc__)
    cli.add_erasure(parser, "lr", "scale_factor", "threshold", "reg_beta", "iter_break", "max_base", "batch_size", "templates",
                    "init", "ridge", "keep", "spare", "anchor")
    parser.add_argument("--joint", action="store_true", help="all concepts at once: SRS-ME-dagger")
    cli.add_dtype(parser)
    parser.add_argument("--plan", action="store_true", help="print the predicted peak memory of each choice, and end")
    args = parser.parse_args()
    method = "SRS-ME-dagger" if args.is_joint else "SRS-ME"
    if args.plan:
        print(f"predicted peak memory, GiB:\n{to_markdown(cli.foresee(args, method))}")
        return
    with cli.memory_explained(args, method):
        cli.erase(args, method)


if __name__ == "__main__":
    cli.run(main)
