"""What scenes.py and the ablations share: their arguments, and the experiment and tables that these ask for."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from ldm import ablation, cli
from ldm.experiments.ablations import Variant
from ldm.config.concepts import parse_erase_targets
from ldm.config.scenes import load_scene
from ldm.io.paths import REPO_ROOT
from ldm.experiments.experiment import Experiment
from ldm.erasure.methods import METHODS
from ldm.metrics.classify import ImageNetObjects, classifier_path, load_classifier
from ldm.metrics.frechet import distance_column
from ldm.config.models import load_model_config


def add_experiment(parser: cli.Parser, folder: str) -> None:
    """What scenes and ablations share: how much is drawn, by what, and where it goes."""
    cli.add_model(parser)
    cli.add_category(parser)
    for flag, text in (("--num_seeds", "images of each prompt for each set of weights"),
                       ("--num_pictures", "pictures to learn each erasure from")):
        parser.add_argument(flag, type=cli.positive, default=None, help=f"{text} (default: the model's config)")
    parser.add_argument("--save_path", type=Path, default=REPO_ROOT / "evaluation_folder" / folder)
    parser.add_argument("--shifts_path", type=Path, default=None, help="where shifts are kept (default: SAVE_PATH/shifts)")
    parser.add_argument("--settings", nargs="*", default=[], help="changes of the methods' settings, such as FMN.lr=1e-2")
    parser.add_argument("--seed", type=int, default=0, help="of the erasures")
    parser.add_argument("--model_path", type=Path, default=None, help="classifier (default: models/classifiers/CATEGORY.safetensors)")
    parser.add_argument("--imagenet_path", type=Path, default=None, help="for objects: torchvision's ImageNet ResNet50, as the paper")
    cli.add_sampling(parser)
    cli.add_inception(parser)
    cli.add_device(parser)


def experiment(args: cli.Namespace) -> Experiment:
    """The experiment that `add_experiment`'s arguments describe, with the category's classifier if it has one."""
    device = cli.parse_devices(args.device)[0]
    path = args.model_path or classifier_path(args.erase_cat)
    classifier = load_classifier(path, device)[0] if args.model_path or path.is_file() else None
    if args.imagenet_path:
        if args.erase_cat != "object":
            raise ValueError("--imagenet_path goes with --erase_cat object: ImageNet has no other of the categories")
        classifier = ImageNetObjects(args.imagenet_path).to(device)
    if args.inception_path and not args.inception_path.is_file():
        raise ValueError(f"no file {args.inception_path}: pass FID's Inception weights to --inception_path, or leave it out")
    model = cli.load_model(args, device)
    cli.fill(args, load_model_config(model.base).sampling)
    cli.fill(args, load_model_config(model.base).evaluation)
    args.shifts_path = args.shifts_path or args.save_path / "shifts"
    sampling = {name: getattr(args, name) for name in ("ddim_steps", "guidance_scale", "batch_size")}
    return Experiment(model, args.erase_cat, args.save_path / args.erase_cat, classifier, sampling, args.num_seeds,
                      args.num_pictures, args.inception_path)


def add_ablation(parser: cli.Parser, values: str, text: str) -> None:
    """An experiment's arguments, the concepts to erase, and the values to compare."""
    add_experiment(parser, "ablations")
    parser.add_argument("--erased_index", default="0,1,2", help="concepts to erase and merge, such as 0,1,2")
    parser.add_argument("--values", default=values, help=text)


def ablate(args: cli.Namespace, name: str, setting: str, zero: bool = False) -> None:
    """Erase and measure with each of --values for one of SRS-ME's settings, the erased concepts protecting each other; `zero`
    says whether 0 is a value of it."""
    erased = [concept.index for concept in parse_erase_targets(args.erased_index, args.erase_cat)]
    values = cli.parse_numbers(args.values)
    if min(values) < 0 or not zero and 0 in values:
        raise ValueError(f"--values {args.values}: give numbers above 0" + ", or 0" * zero)
    tried = experiment(args)
    given = srs_me(args, tried)
    if not given["iter_break"]:  # a closed form, which knows nothing of how one learns
        given |= {"init": "zero", "iter_break": steps(args, tried)}
    variants = [Variant(value, given | {setting: value}, erased) for value in values]
    finish(args, ablation.ablate(tried, args.shifts_path, name, erased, variants), "status", setting, name, log=True)


def steps(args: cli.Namespace, tried: Experiment) -> int:
    """The most steps of an erasure that learns from zero: SRS-ME-dagger's, which always does."""
    return cli.methods_settings(tried.model.base, args.settings)["SRS-ME-dagger"]["iter_break"]


def srs_me(args: cli.Namespace, tried: Experiment) -> dict:
    """SRS-ME's settings for an ablation."""
    return cli.methods_settings(tried.model.base, args.settings)["SRS-ME"] | {"seed": args.seed}


def finish(args: cli.Namespace, table: pd.DataFrame, by: str, x: str, name: str, log: bool = False) -> None:
    """Write an ablation's table and plot, and print the means."""
    path = args.save_path / args.erase_cat / name
    print(ablation.write(table, by, x, distance_column(args.inception_path), path, log))
    print(f"-> {path}.png, .md, .csv")


def parse_methods(text: str) -> list[str]:
    """'SRS-ME,FMN' -> names of methods. Raises ValueError for an unknown name, or none."""
    names = list(dict.fromkeys(filter(None, (piece.strip() for piece in text.split(",")))))
    unknown = [name for name in names if name not in METHODS]
    if unknown or not names:
        raise ValueError(f"'{(unknown or [text])[0]}' is no method: choose from {','.join(METHODS)}")
    return names


def parse_scenes(text: str) -> list[int]:
    """'1,2' -> scenes of configs/scenes.yaml. Raises ValueError for anything that is none."""
    pieces = [piece.strip() for piece in text.split(",")]
    for piece in pieces:
        if not piece.isdigit():
            raise ValueError(f"--scene {text}: give numbers of configs/scenes.yaml, such as 4 or 1,2,3,4")
        load_scene(int(piece))  # before any work, so that a wrong number costs none
    return [int(piece) for piece in dict.fromkeys(pieces)]
