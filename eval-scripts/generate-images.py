"""Generate the images of a prompt list by one model: a merged one by name, or any model folder.

Writes SAVE_PATH/MODEL_NAME; images that are there are kept, so a stopped run goes on with the same command.
"""

from pathlib import Path

from ldm import cli
from ldm.io.paths import REPO_ROOT
from ldm.io.prompts import read_prompt_csv
from ldm.config.models import load_model_config
from ldm.diffusion.load import load_model
from ldm.diffusion.sampling import generate_to_folder


def main() -> None:
    parser = cli.parser(__doc__)
    parser.add_argument("--model_name", required=True, help="a folder in --models_path, or the path of a diffusers folder")
    parser.add_argument("--models_path", type=Path, default=REPO_ROOT / "models" / "merged", help="where Merge_model.py writes")
    parser.add_argument("--prompts_path", type=Path, required=True, help="CSV: prompt,evaluation_seed,case_number")
    parser.add_argument("--save_path", type=Path, required=True, help="folder for the image folder")
    parser.add_argument("--from_case", type=int, default=0, help="leave out lower case numbers")
    cli.add_sampling(parser, samples=1)
    cli.add_compile(parser)
    cli.add_dtype(parser)
    cli.add_device(parser)
    args = parser.parse_args()
    cases = [case for case in read_prompt_csv(args.prompts_path) if case.number >= args.from_case]
    merged = args.models_path / args.model_name
    device, share = cli.join(cli.parse_devices(args.device)[0])
    model = load_model(merged if merged.is_dir() else args.model_name, device, dtype=cli.DTYPES[args.dtype])
    cli.fill(args, load_model_config(model.base).sampling)
    folder = args.save_path / model.name
    drawn = generate_to_folder(model, cases, folder, model.generation_metadata, args.num_samples, args.ddim_steps, args.guidance_scale,
                            args.batch_size, share, args.compile)
    print(f"{drawn} images drawn, {len(list(folder.rglob('*.png')))} in {folder}")


if __name__ == "__main__":
    cli.run(main)
