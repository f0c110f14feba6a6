"""Erase concepts by SRS-ME: one weight shift each, inside the null space of all that is protected.

Concepts are texts or files (--concepts 'Greg Rutkowski' 'a red fox' --protect 'a dog'), or indexes of --category. The
null space is solved here, but where SRSME_Solution.py has made it. Writes shift-CONCEPT.safetensors with its learning
curve beside it, measured: the table says how far each changes its own prompt and what is protected. The base model is
never changed; merge shifts with generate-images-merge.py, Merge_model.py or --export, and restore a concept by leaving
its shift out. By default the shift is a closed form; a flag of training (--lr, --stop_threshold, --max_steps,
--init zero) trains it as the paper does. --joint trains all of them at once, their losses balanced (SRS-ME-dagger).
"""

from pathlib import Path

from ldm.cli import arguments, concepts
from ldm.cli.run import run
from ldm.config.methods import FORMATS, GateConfig, JointSRSMEConfig, SRSMEConfig


def main() -> None:
    parser = arguments.make_parser(__doc__)
    concepts.add_protection(parser)
    concepts.add_retain(parser)
    concepts.add_erasure(parser, SRSMEConfig)
    arguments.add_null_space(parser)
    arguments.add_settings(parser, GateConfig)
    parser.option("joint", action="store_true", help="all concepts at once: SRS-ME-dagger")
    arguments.add_unet_dtype(parser)
    text = "instead of a model, its text encoder and tokenizer alone, in a folder: its shifts fit every model with it"
    parser.option("text_encoder", type=Path, default=None, metavar="FOLDER", help=text)
    text = "with --text_encoder: change its pooled embedding too, which FLUX and Stable Diffusion 3 take of some"
    parser.option("pooled", action="store_true", help=text)
    parser.option(
        "estimate_memory", action="store_true", help="print the predicted peak memory of each choice, and end"
    )
    text = (
        "generate so many images of the concepts and the protected prompts, before and after, into a grid with numbers"
    )
    parser.option("check", type=arguments.positive_int, default=None, help=text)
    parser.option("clip_path", type=Path, default=None, help="a folder with a CLIP model, by which --check scores too")
    text = "print what would be made, from what and in how much memory, and end: nothing is loaded or written"
    parser.option("dry_run", action="store_true", help=text)
    text = f"write the model without these concepts too: one or more of {','.join(FORMATS)}"
    parser.option("export", type=arguments.parse_formats, default=None, help=text)
    parser.option("export_dir", type=Path, default=None, help="where to (default: ARTIFACTS_DIR/merged)")
    args = parser.parse_args()
    from ldm.cli import erasure, output

    method = JointSRSMEConfig.name if args.joint else SRSMEConfig.name
    if args.estimate_memory:
        output.show_table(erasure.memory_table(args, method), title="predicted peak memory, GiB:")
        return
    if args.dry_run:
        erasure.show_plan(args, method)
        return
    with erasure.explain_oom(args, method):
        erasure.run_erasure(args, method)


if __name__ == "__main__":
    run(main)
