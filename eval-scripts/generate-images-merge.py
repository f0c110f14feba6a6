"""Generate the images of a prompt list by the base model with any set of shifts merged in.

Writes SAVE_PATH/012-merge for --merge 0,1,2 (FMN-012-merge with --method FMN) and SAVE_PATH/ori-merge for none; images
that are there are kept, so a stopped run goes on with the same command.
"""

from pathlib import Path

from ldm import cli
from ldm.io.prompts import read_prompt_csv
from ldm.config.models import load_model_config
from ldm.diffusion.sampling import generate_to_folder
from ldm.erasure.merge import applied


def main() -> None:
    parser = cli.parser(__doc__)
    cli.add_model(parser)
    cli.add_category(parser)
    cli.add_scene(parser)
    cli.add_merge(parser)
    parser.add_argument("--prompts_path", type=Path, required=True, help="CSV: prompt,evaluation_seed,case_number")
    parser.add_argument("--save_path", type=Path, required=True, help="folder for the image folders")
    parser.add_argument("--from_case", type=int, default=0, help="leave out lower case numbers")
    cli.add_sampling(parser, samples=1)
    cli.add_compile(parser)
    cli.add_device(parser)
    args = parser.parse_args()
    cases = [case for case in read_prompt_csv(args.prompts_path) if case.number >= args.from_case]
    device, share = cli.join(cli.parse_devices(args.device)[0])
    model = cli.load_model(args, device)
    cli.fill(args, load_model_config(model.base).sampling)
    shifts, name = cli.store(args, model.name, args.method).load_merge(args.merge)
    for shift in shifts.values():
        shift.check(model.digest, model.unet)
    recipe = model.generation_metadata | {"shifts": {label: shift.metadata for label, shift in shifts.items()}}
    folder = args.save_path / f"{name}-merge"
    with applied(model.unet, list(shifts.values())):
        drawn = generate_to_folder(model, cases, folder, recipe, args.num_samples, args.ddim_steps, args.guidance_scale,
                                args.batch_size, share, args.compile)
    print(f"{drawn} images drawn, {len(list(folder.rglob('*.png')))} in {folder}")


if __name__ == "__main__":
    cli.run(main)
