"""Erase concepts by SRS-ME: make, for each, a weight shift inside the null space that SRSME_Solution.py found.

Writes shift-INDEX.safetensors and its learning curve shift-INDEX.csv. The base model is never changed; merge shifts
with generate-images-merge.py or Merge_model.py, and restore a concept by leaving its shift out. Each has a gate too,
which acts on the prompts that say the concept and leaves all others bit for bit as they are. --joint trains all of
them at once, their losses balanced (SRS-ME-dagger). --estimate_memory prints how much memory each choice of
--unet_dtype and --gradient_checkpointing will take, and ends.
"""

from ldm.cli import arguments
from ldm.cli.run import run
from ldm.config.methods import GateConfig, JointSRSMEConfig, SRSMEConfig


def main() -> None:
    parser = arguments.make_parser(__doc__)
    arguments.add_erasure(parser, SRSMEConfig)
    arguments.add_settings(parser, GateConfig)
    parser.option("joint", action="store_true", help="all concepts at once: SRS-ME-dagger")
    arguments.add_unet_dtype(parser)
    parser.option(
        "estimate_memory", action="store_true", help="print the predicted peak memory of each choice, and end"
    )
    args = parser.parse_args()
    from ldm.cli import erasure, output

    method = JointSRSMEConfig.name if args.joint else SRSMEConfig.name
    if args.estimate_memory:
        output.show_table(erasure.memory_table(args, method), title="predicted peak memory, GiB:")
        return
    with erasure.explain_oom(args, method):
        erasure.run_erasure(args, method)


if __name__ == "__main__":
    run(main)
