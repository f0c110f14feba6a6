"""Merge any set of shifts into a copy of the base model, or write each as a LoRA, in the format that its user reads.

--format takes one or more of compvis, diffusers, unet (merged weights), lora, kohya (a LoRA a concept, cut to --rank),
shift (a small file a concept, to share, with a card) and comfyui (a custom node with the shifts' gates). Reports the
leakage of each shift on the other concepts' prompts, or which gates these trip. A concept left out of --shifts is
restored.
"""

from pathlib import Path

from ldm.cli import arguments, habits
from ldm.cli.run import run


def main() -> None:
    parser = arguments.make_parser(__doc__)
    arguments.add_model(parser)
    arguments.add_category(parser)
    arguments.add_artifacts(parser)
    arguments.add_shifts(parser, required=True)
    arguments.add_export(parser)
    parser.option(
        "save_path",
        type=Path,
        default=None,
        help="the folder NAME or NAME-FORMAT goes here (default: ARTIFACTS_DIR/merged)",
    )
    arguments.add_device(parser)
    habits.add_json(parser)
    args = parser.parse_args()
    from ldm.cli import session
    from ldm.erasure.export import export
    from ldm.erasure.merge import load_shifts, reported_prompts
    from ldm.erasure.portable import take_shifts

    config = arguments.export_config(args)
    model = session.load_model(args, session.first_device(args), dtype=None)
    shifts, name = load_shifts(session.artifact_paths(args, model.name, args.method), args.shifts)
    if not shifts:
        raise ValueError(
            "`shifts` names no shift: give names such as 'Greg Rutkowski', indexes such as 0,1,2, or files"
        )
    shifts = take_shifts(model, shifts)
    prompts = reported_prompts(shifts, args.category)
    folder = args.save_path or args.artifacts_dir / "merged"
    session.print_export(export(model, shifts, folder / f"{model.name}-{name}", config, prompts))


if __name__ == "__main__":
    run(main)
