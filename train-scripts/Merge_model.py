"""Merge any set of shifts into a copy of the base model, or write each as a LoRA, in the format that its user reads.

--format takes one or more of compvis, diffusers, unet (merged weights) and lora, kohya (a LoRA a concept, cut to --rank).
Reports how far each shift moves what the other concepts' prompts see. A concept left out of --merge is restored.
"""

from pathlib import Path

from ldm import cli
from ldm.cli import DTYPES
from ldm.config.concepts import load_concepts
from ldm.io.paths import REPO_ROOT
from ldm.erasure.export import export


def main() -> None:
    parser = cli.parser(__doc__)
    cli.add_model(parser)
    cli.add_category(parser)
    cli.add_scene(parser)
    cli.add_merge(parser, required=True)
    cli.add_export(parser)
    parser.add_argument("--save_path", type=Path, default=REPO_ROOT / "models" / "merged", help="the folder NAME or NAME-FORMAT goes here")
    cli.add_device(parser)
    args = parser.parse_args()
    model = cli.load_model(args, cli.parse_devices(args.device)[0])
    shifts, name = cli.store(args, model.name, args.method).load_merge(args.merge)
    if not shifts:
        raise ValueError("--merge names no shift: give indexes such as 0,1,2, or shift files")
    for shift in shifts.values():
        shift.check(model.digest, model.unet)
    prompts = ["", *(concept.prompt for concept in load_concepts(args.erase_cat))]
    cli.show_export(*export(model, shifts, args.save_path / f"{model.name}-{name}", args.format, DTYPES[args.dtype], args.rank,
                            args.share, prompts, "Merge_model.py"))


if __name__ == "__main__":
    cli.run(main)
