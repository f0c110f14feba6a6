"""Generate the images of a prompt list by the base model with any set of shifts merged in.

Writes SAVE_PATH/012-merge for --shifts 0,1,2 (FMN-012-merge with --method FMN) and SAVE_PATH/ori-merge for none; images
that exist are kept, so that the same command resumes a stopped run.
"""

from ldm.cli import arguments
from ldm.cli.run import run
from ldm.config.methods import EditConfig


def main() -> None:
    parser = arguments.make_parser(__doc__)
    arguments.add_model(parser)
    arguments.add_category(parser)
    arguments.add_artifacts(parser)
    arguments.add_shifts(parser)
    arguments.add_settings(parser, EditConfig, "form")
    arguments.add_prompt_list(parser)
    arguments.add_sampling(parser, images_per_seed=1)
    arguments.add_compile(parser)
    arguments.add_device(parser)
    args = parser.parse_args()
    from ldm.cli import devices, session
    from ldm.config.models import describe_sources, load_model_config
    from ldm.diffusion.image_folder import generate_to_folder
    from ldm.erasure.effect import notify_of_weak
    from ldm.erasure.merge import describe_forms, edited, load_shifts, shifts_metadata
    from ldm.erasure.portable import take_shifts
    from ldm.io.images import find_images

    cases = session.prompt_cases(args)
    device, shard = devices.init_distributed(session.first_device(args))
    model = session.load_model(args, device)
    config = load_model_config(model)
    sampling, edit = session.fill_settings(args, config.sampling), session.fill_settings(args, config.edit)
    shifts, name = load_shifts(session.artifact_paths(args, model.name, args.method), args.shifts)
    shifts = take_shifts(model, shifts)
    print(describe_sources(config, ["sampling", "edit"], arguments.spelled))
    print(describe_forms(shifts, edit.form))
    notify_of_weak(shifts, edit, "erase it anew, or look at what is generated")
    metadata = {**model.generation_metadata, **shifts_metadata(shifts, edit.form)}
    folder = args.save_path / f"{name}-merge"
    with edited(model, shifts, edit.form):
        num_generated = generate_to_folder(
            model, cases, folder, metadata, sampling, args.images_per_seed, shard, args.compile
        )
    print(f"{num_generated} images generated, {len(find_images(folder))} in {folder}")


if __name__ == "__main__":
    run(main)
