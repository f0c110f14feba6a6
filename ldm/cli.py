"""What all scripts share: arguments, devices, and the one place where an exception becomes a line and exit code 2."""

from __future__ import annotations

import argparse
import math
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import torch
from omegaconf import OmegaConf

from ldm import ablation
from ldm.ablation import Variant
from ldm.attention import TRAIN_METHODS
from ldm.concepts import CATEGORIES, ROOT, load_scene, parse_erased
from ldm.erasure import make_shifts
from ldm.experiment import Experiment
from ldm.losses import METHODS
from ldm.metrics.classify import ImageNetObjects, classifier_path, load_classifier
from ldm.metrics.compare import to_markdown
from ldm.metrics.frechet import column
from ldm.model import TextToImage, load, settings
from ldm.store import Store


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message: str):
        print(f"{self.prog}: error: {message} (see --help)", file=sys.stderr)
        sys.exit(2)


def parser(description: str) -> Parser:
    return Parser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)


def add_category(parser: Parser) -> None:
    parser.add_argument("--erase_cat", choices=CATEGORIES, default="style", help="which concepts the indexes count")


def add_device(parser: Parser, flag: str = "--device") -> None:
    several = "; of several, such as 0,1, the first is used" if flag == "--devices" else ""
    parser.add_argument(flag, default=None,
                        help=f"cpu, cuda:0 or 0{several}; without it CUDA if there is one, else cpu")


def add_model(parser: Parser) -> None:
    """--model and the CompVis pair of the original."""
    parser.add_argument("--model", default=str(ROOT / "models" / "mini-sd"), help="a diffusers folder or a hub id")
    parser.add_argument("--config_path", default=None, help="a CompVis config (not loaded by this version)")
    parser.add_argument("--ckpt_path", default=None, help="a CompVis checkpoint (not loaded by this version)")


def add_scene(parser: Parser) -> None:
    parser.add_argument("--scenei", type=int, default=1, help="scene, part of where bases and shifts are kept")
    parser.add_argument("--timei", type=int, default=0, help="time in the scene, likewise")
    parser.add_argument("--shifts_path", type=Path, default=ROOT / "models", help="where they are kept, by method")


def add_merge(parser: Parser, required: bool = False) -> None:
    """--merge and the method whose shifts its indexes mean."""
    parser.add_argument("--merge", default="", required=required,
                        help="shifts to merge: indexes such as 0,1,2, or shift files" + ("" if required else "; none: original"))
    parser.add_argument("--method", choices=METHODS, default="SRS-ME", help="whose shifts the indexes mean")


# A method's settings that are flags of its script; where one is left out, the model's config gives the value.
SETTINGS = {
    "lr": (float, "Adam's rate"), "iter_break": (None, "most steps"), "batch_size": (None, "latents a step"),
    "scale_factor": (float, "beta, the basis' scale"), "reg_beta": (float, "weight of |dW|_1"),
    "threshold": (float, "stop when the momentum of the correlation falls to it"),
    "max_base": (None, "most basis vectors, those that the concept reaches most"),
    "templates": (int, "caption templates to erase beside the bare name"),
    "train_method": (str, f"which weights to train: {', '.join(TRAIN_METHODS)}"),
    "start_guidance": (float, "guidance with which the training latents are drawn"),
    "negative_guidance": (float, "eta, how far to turn away from the concept"),
    "ddim_steps": (None, "sampler steps of the training latents")}


def add_erasure(parser: Parser, *flags: str) -> None:
    """What every erasure takes, and those of a method's settings that `flags` names."""
    add_model(parser)
    add_category(parser)
    parser.add_argument("--erased_index", required=True, help="concepts to erase, such as 0 or 0,1,2")
    add_scene(parser)
    for flag in flags:
        kind, text = SETTINGS[flag]
        parser.add_argument(f"--{flag}", type=kind or positive, default=None, help=f"{text} (default: the model's config)")
    parser.add_argument("--data_path", type=Path, default=ROOT / "data", help="has a folder of images per concept")
    parser.add_argument("--seed", type=int, default=0)
    add_device(parser, "--devices")


def erase(args: argparse.Namespace, method: str) -> None:
    """Run a method on the concepts of --erased_index, and print what it took."""
    concepts = parse_erased(args.erased_index, args.erase_cat)
    model = load_model(args, parse_devices(args.devices)[0])
    given = methods_settings(model.base, [])[method] | {"seed": args.seed}
    given |= {name: value for name, value in vars(args).items() if name in given and value is not None}
    rows = make_shifts(model, store(args, model.name, method), concepts, given, args.data_path)
    if rows:
        print(to_markdown(pd.DataFrame(rows)))


def add_sampling(parser: Parser, samples: int | None = None) -> None:
    if samples:
        parser.add_argument("--num_samples", type=positive, default=samples, help="images for each seed")
    parser.add_argument("--ddim_steps", type=positive, default=None, help="sampler steps (default: the model's config)")
    parser.add_argument("--guidance_scale", type=float, default=None, help="guidance (default: the model's config)")
    parser.add_argument("--batch_size", type=positive, default=None, help="images at once (default: the model's config)")


def add_inception(parser: Parser) -> None:
    parser.add_argument("--inception_path", type=Path, default=None,
                        help="FID's Inception weights (torch-fidelity's .pth); without them AlexNet's features")


def positive(text: str) -> int:
    """argparse type: a whole number from 1."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number from 1")
    return int(text)


def parse_devices(text: str | None) -> list[torch.device]:
    """'0,1', 'cuda:0', 'cpu' or None (CUDA if there is one, else CPU) -> devices.

    Raises ValueError for anything else, and for a CUDA device that is not here.
    """
    if text is None:
        return [torch.device("cuda" if torch.cuda.is_available() else "cpu")]
    devices = []
    for piece in (piece.strip() for piece in text.split(",")):
        try:
            device = torch.device(f"cuda:{piece}" if piece.isdigit() else piece)
        except RuntimeError:
            device = None
        if device is None or device.type not in ("cpu", "cuda"):
            raise ValueError(f"'{piece}' is no device: give cpu, or cuda:0 or 0 for the first GPU")
        if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
            raise ValueError(f"device '{piece}' needs CUDA device {device.index or 0}, and this machine has "
                             f"{torch.cuda.device_count()}: use cpu")
        devices.append(device)
    return devices


def add_experiment(parser: Parser, folder: str) -> None:
    """What scenes and ablations share: how much is drawn, by what, and where it goes."""
    add_model(parser)
    add_category(parser)
    for flag, text in (("--num_seeds", "images of each prompt for each set of weights"),
                       ("--num_pictures", "pictures to learn each erasure from")):
        parser.add_argument(flag, type=positive, default=None, help=f"{text} (default: the model's config)")
    parser.add_argument("--save_path", type=Path, default=ROOT / "evaluation_folder" / folder)
    parser.add_argument("--shifts_path", type=Path, default=None, help="where shifts are kept (default: SAVE_PATH/shifts)")
    parser.add_argument("--settings", nargs="*", default=[], help="changes of the methods' settings, such as FMN.lr=1e-2")
    parser.add_argument("--seed", type=int, default=0, help="of the erasures")
    parser.add_argument("--model_path", type=Path, default=None, help="classifier (default: models/classifiers/CATEGORY.safetensors)")
    parser.add_argument("--imagenet_path", type=Path, default=None, help="for objects: torchvision's ImageNet ResNet50, as the paper")
    add_sampling(parser)
    add_inception(parser)
    add_device(parser)


def experiment(args: argparse.Namespace) -> Experiment:
    """The experiment that `add_experiment`'s arguments describe, with the category's classifier if it has one."""
    device = parse_devices(args.device)[0]
    path = args.model_path or classifier_path(args.erase_cat)
    classifier = load_classifier(path, device)[0] if args.model_path or path.is_file() else None
    if args.imagenet_path:
        if args.erase_cat != "object":
            raise ValueError("--imagenet_path goes with --erase_cat object: ImageNet has no other of the categories")
        classifier = ImageNetObjects(args.imagenet_path).to(device)
    if args.inception_path and not args.inception_path.is_file():
        raise ValueError(f"no file {args.inception_path}: pass FID's Inception weights to --inception_path, or leave it out")
    model = load_model(args, device)
    fill(args, settings(model.base).sampling)
    fill(args, settings(model.base).evaluation)
    args.shifts_path = args.shifts_path or args.save_path / "shifts"
    sampling = {name: getattr(args, name) for name in ("ddim_steps", "guidance_scale", "batch_size")}
    return Experiment(model, args.erase_cat, args.save_path / args.erase_cat, classifier, sampling, args.num_seeds,
                      args.num_pictures, args.inception_path)


def methods_settings(base: str, changes: list[str]) -> dict[str, dict]:
    """The settings of every method in the config of model `base`, changed by such as `FMN.lr=1e-2`.

    Raises ValueError when a change names no setting.
    """
    given = OmegaConf.to_container(settings(base).erasure)
    for change in changes:
        place, _, text = change.partition("=")
        method, _, name = place.partition(".")
        try:
            if name not in given[method]:
                raise ValueError
            given[method][name] = (SETTINGS[name][0] or positive)(text)
        except (KeyError, ValueError, argparse.ArgumentTypeError):
            raise ValueError(f"--settings {change}: give METHOD.SETTING=VALUE as in the model's config, such as FMN.lr=1e-2") from None
    return given


def add_ablation(parser: Parser, values: str, text: str) -> None:
    """An experiment's arguments, the concepts to erase, and the values to compare."""
    add_experiment(parser, "ablations")
    parser.add_argument("--erased_index", default="0,1,2", help="concepts to erase and merge, such as 0,1,2")
    parser.add_argument("--values", default=values, help=text)


def ablate(args: argparse.Namespace, name: str, setting: str, log: bool = False) -> None:
    """Erase and measure with each of --values for one of SRS-ME's settings, the erased concepts protecting each other."""
    erased = [concept.index for concept in parse_erased(args.erased_index, args.erase_cat)]
    values = parse_numbers(args.values)
    if log and min(values) <= 0:
        raise ValueError(f"--values {args.values}: give numbers above 0, which the plot's axis shows by their logarithm")
    tried = experiment(args)
    variants = [Variant(value, srs_me(args, tried) | {setting: value}, erased) for value in values]
    finish(args, ablation.ablate(tried, args.shifts_path, name, erased, variants), "status", setting, name, log)


def srs_me(args: argparse.Namespace, tried: Experiment) -> dict:
    """SRS-ME's settings for an ablation."""
    return methods_settings(tried.model.base, args.settings)["SRS-ME"] | {"seed": args.seed}


def finish(args: argparse.Namespace, table: pd.DataFrame, by: str, x: str, name: str, log: bool = False) -> None:
    """Write an ablation's table and plot, and print the means."""
    path = args.save_path / args.erase_cat / name
    print(ablation.write(table, by, x, column(args.inception_path), path, log))
    print(f"-> {path}.png, .md, .csv")


def parse_numbers(text: str) -> list[float]:
    """'0,1e-6' -> numbers. Raises ValueError for anything else, or fewer than two."""
    try:
        numbers = [float(piece) for piece in text.split(",")]
    except ValueError:
        numbers = [math.nan]
    if not all(map(math.isfinite, numbers)):
        raise ValueError(f"--values {text}: give numbers such as 0,1e-6")
    if len(set(numbers)) < 2:
        raise ValueError(f"--values {text}: give two different numbers or more, such as 0,1e-6")
    return list(dict.fromkeys(numbers))


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


def load_model(args: argparse.Namespace, device: torch.device) -> TextToImage:
    """The model that --model names. Raises ValueError for a CompVis pair, which this version does not load."""
    if args.config_path or args.ckpt_path:
        raise ValueError("--config_path and --ckpt_path name a CompVis checkpoint, which this version does not load "
                         "yet: pass a diffusers folder to --model")
    return load(args.model, device)


def fill(args: argparse.Namespace, settings) -> None:
    """Give every argument that was left out its value from the model's config."""
    for name, value in settings.items():
        if getattr(args, name, value) is None:
            setattr(args, name, value)


def store(args: argparse.Namespace, model_name: str, method: str) -> Store:
    return Store(args.shifts_path, method, model_name, args.erase_cat, args.scenei, args.timei)


def default_data(category: str, root: Path = ROOT / "data") -> Path:
    """Where a category's train and eval folders are: `root` for styles, else root/CATEGORY."""
    return root if category == "style" else root / category


def run(main: Callable[[], None]) -> None:
    """Run a script's main. Bad input ends in one line on stderr and exit code 2; SRSME_TRACEBACK=1 shows where.

    A batch system's SIGTERM ends it like Ctrl-C, so that half-written files are removed.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        main()
    except KeyboardInterrupt:
        print("stopped; nothing is half written, and the same command goes on or starts over", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError, FloatingPointError, torch.OutOfMemoryError) as error:
        if os.environ.get("SRSME_TRACEBACK"):
            raise
        print(f"{Path(sys.argv[0]).name}: error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
