"""Make images of concepts: by a model, or by the renderer of the synthetic dataset (--source synthetic).

Every concept's images go to SAVE_PATH/CONCEPT, for SRS_ME.py, and, split 70 to 30, to SAVE_PATH/train/CLASS and
SAVE_PATH/eval/CLASS, for artist-cls-train.py; class 0 is the empty prompt's. For every category but style the two are
in SAVE_PATH/CATEGORY. A --prompt that is no concept of the category is one of your own: its images, by the model, go to
SAVE_PATH/PROMPT alone, for the scripts that take it by --concepts. The same command resumes a stopped run.
"""

import itertools
import shutil
import zlib
from pathlib import Path

from ldm.cli import arguments
from ldm.cli.arguments import Namespace
from ldm.cli.concepts import data_concepts
from ldm.cli.run import run
from ldm.config.concepts import Concept, identity_of, image_folder
from ldm.io.files import atomic_write
from ldm.io.paths import REPO_ROOT


def make_images(args: Namespace, model, concept: Concept | None) -> list[Path]:
    """Make one concept's images and copy them into its class folders, if it has any; return the paths of the copies."""
    import numpy as np

    from ldm.cli import session
    from ldm.config.models import load_model_config
    from ldm.diffusion.image_folder import generate_to_folder
    from ldm.io.images import image_filename
    from ldm.io.prompts import PromptCase
    from ldm.io.tensors import CREATED_BY
    from ldm.toy.render import render_to_folder

    data_dir = arguments.default_data_dir(args.category, args.save_path)
    name, prompt, label = (concept.name, concept.prompt, concept.index + 1) if concept else (None, "", 0)
    folder = image_folder(args.save_path, concept) if concept else data_dir / "empty"
    is_own = concept is not None and concept.is_own
    number = zlib.crc32(identity_of(prompt).encode()) if is_own else label  # so that each has other seeds
    seeds = np.random.default_rng([args.seed, number]).choice(2**31, size=args.seeds_per_prompt, replace=False)
    cases = [PromptCase(prompt, int(seed), k) for k, seed in enumerate(seeds)]
    metadata = {"created_by": CREATED_BY, "seeds_per_prompt": args.seeds_per_prompt, "seed": args.seed}
    metadata["synthetic"] = args.source == "synthetic"
    if metadata["synthetic"]:
        render_to_folder(name, args.category, cases, folder, metadata, args.images_per_seed)
    else:
        metadata |= model.generation_metadata
        sampling = session.fill_settings(args, load_model_config(model).sampling)
        generate_to_folder(model, cases, folder, metadata, sampling, args.images_per_seed)
    if is_own:
        print(f"{folder.name}: {len(cases) * args.images_per_seed} images in {folder}")
        return []
    for part in ("train", "eval"):  # what an earlier run with another number of seeds left there
        shutil.rmtree(data_dir / part / str(label), ignore_errors=True)
    paths = []
    for case, n in itertools.product(cases, range(args.images_per_seed)):
        part = "train" if case.case_number < 0.7 * args.seeds_per_prompt else "eval"
        paths.append(data_dir / part / str(label) / image_filename(case.case_number, n))
        with atomic_write(paths[-1]) as partial:
            shutil.copyfile(folder / paths[-1].name, partial)
    print(f"{folder.name}: {len(paths)} images in {folder}")
    return paths


def reconstruct(model, paths: list[Path], batch_size: int = 64) -> None:
    """Write, beside each image, what the model's autoencoder makes of it."""
    from tqdm import tqdm

    from ldm.io.images import load_batch, save_image, tensor_to_images

    for start in tqdm(range(0, len(paths), batch_size), desc="reconstruct", unit="batch"):
        batch = paths[start : start + batch_size]
        images = tensor_to_images(model.decode(model.encode_image(load_batch(batch, model.image_size))))
        for path, image in zip(batch, images, strict=True):
            save_image(path.with_stem(path.stem + "_reconstructed"), image)


def main() -> None:
    parser = arguments.make_parser(__doc__)
    arguments.add_model(parser)
    arguments.add_category(parser)
    text = "one concept, by its name or your own text, '' for the empty prompt; without it all of the category"
    parser.option("prompt", default=None, help=text)
    sources = arguments.choice("model", "synthetic")
    parser.option("source", type=sources, default="model", help="model: that of --model; synthetic: the renderer")
    parser.option("save_path", type=Path, default=REPO_ROOT / "data", help="where to write")
    parser.option("seeds_per_prompt", type=arguments.positive_int, default=50, help="seeds for each concept")
    parser.option("seed", type=arguments.nonnegative_int, default=0, help="what the seeds are chosen from")
    parser.option("reconstruct", action="store_true", help="add each image's autoencoder reconstruction")
    arguments.add_sampling(parser, images_per_seed=1)
    arguments.add_device(parser)
    args = parser.parse_args()
    concepts = data_concepts(args)
    from ldm.cli import session

    needs_model = args.source == "model" or args.reconstruct
    model = session.load_model(args, session.first_device(args)) if needs_model else None
    for concept in concepts:
        paths = make_images(args, model, concept)
        if args.reconstruct:
            reconstruct(model, paths)


if __name__ == "__main__":
    run(main)
