"""Make pictures of concepts: by a model, or by the painter of the embedded model's world (--model_name paint).

Every concept's pictures go to DATA/<concept>/, for SRS_ME.py, and, split 70 to 30, to DATA/train/<class> and
DATA/eval/<class>, for artist-cls-train.py; class 0 is the blank concept. For objects the two are in DATA/object. Goes on
where it stopped.
"""

import itertools
import shutil
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ldm import cli
from ldm.config.concepts import Concept, erasable_concepts, match_concept
from ldm.io.paths import REPO_ROOT
from ldm.io.files import atomic_write
from ldm.io.images import image_filename, load_batch, save_image, tensor_to_images
from ldm.io.prompts import PromptCase
from ldm.toy.render import render_to_folder
from ldm.config.models import load_model_config
from ldm.diffusion.model import DiffusionModel
from ldm.diffusion.sampling import generate_to_folder


def reconstruct(model: DiffusionModel, paths: list[Path], batch: int = 64) -> None:
    """Write, beside each picture, what the model's autoencoder makes of it."""
    for start in tqdm(range(0, len(paths), batch), desc="reconstruct", unit="batch"):
        part = paths[start:start + batch]
        for path, image in zip(part, tensor_to_images(model.decode(model.encode_image(load_batch(part, model.image_size))))):
            save_image(path.with_stem(path.stem + "_reconstructed"), image)


def main() -> None:
    parser = cli.parser(__doc__)
    cli.add_model(parser)
    cli.add_category(parser)
    parser.add_argument("--prompt", default=None, help="one concept, '' for the blank one; without it all of the category")
    parser.add_argument("--model_name", default="0", help="0: the model of --model; paint: the painter")
    parser.add_argument("--save_path", type=Path, default=REPO_ROOT / "data")
    parser.add_argument("--num_seeds", type=cli.positive, default=50, help="seeds for each concept")
    parser.add_argument("--seed", type=int, default=0, help="what the seeds are drawn from")
    parser.add_argument("--reconstruct", action="store_true", help="add each picture's autoencoder reconstruction")
    cli.add_sampling(parser, samples=1)
    cli.add_device(parser)
    args = parser.parse_args()
    if args.model_name not in ("0", "paint"):
        raise ValueError(f"--model_name {args.model_name}: give 0 for the model that --model names, or paint")
    if args.prompt:
        chosen = [match_concept(args.erase_cat, args.prompt)]
        if chosen[0] is None or chosen[0].watermark:
            names = ", ".join(concept.name for concept in erasable_concepts(args.erase_cat))
            raise ValueError(f"'{args.prompt}' is no {args.erase_cat} concept: choose from {names}")
    else:
        chosen = [None] if args.prompt == "" else [None, *erasable_concepts(args.erase_cat)]
    paint = args.model_name == "paint"
    model = None
    if not paint or args.reconstruct:
        model = cli.load_model(args, cli.parse_devices(args.device)[0])
        cli.fill(args, load_model_config(model.base).sampling)
    split = cli.default_data(args.erase_cat, args.save_path)
    for concept in chosen:
        make(args, model, concept, paint, split)


def make(args, model: DiffusionModel | None, concept: Concept | None, paint: bool, split: Path) -> None:
    """One concept's pictures; None is the blank one."""
    name, label = (concept.name, concept.index + 1) if concept else ("blank", 0)
    rng = np.random.default_rng([args.seed, label])
    seeds = rng.choice(2**31, size=args.num_seeds, replace=False)
    cases = [PromptCase(concept.prompt if concept else "", int(seed), k) for k, seed in enumerate(seeds)]
    folder = (args.save_path if concept else split) / name
    recipe = {"made_by": "generate-data.py", "num_seeds": args.num_seeds, "seed": args.seed, "painted": paint}
    if paint:
        render_to_folder(concept and concept.name, args.erase_cat, cases, folder, recipe, args.num_samples)
    else:
        generate_to_folder(model, cases, folder, recipe | model.generation_metadata, args.num_samples, args.ddim_steps,
                        args.guidance_scale, args.batch_size)
    for part in ("train", "eval"):  # what an earlier run with another number of seeds left there
        shutil.rmtree(split / part / str(label), ignore_errors=True)
    paths = []
    for case, n in itertools.product(cases, range(args.num_samples)):
        part = "train" if case.number < 0.7 * args.num_seeds else "eval"
        paths.append(split / part / str(label) / image_filename(case.number, n))
        with atomic_write(paths[-1]) as partial:
            shutil.copyfile(folder / paths[-1].name, partial)
    if args.reconstruct:
        reconstruct(model, paths)
    print(f"{name}: {len(paths)} pictures in {folder}")


if __name__ == "__main__":
    cli.run(main)
