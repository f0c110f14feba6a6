"""What all scripts share: arguments, devices, and the one place where an exception becomes a line and exit code 2."""

from __future__ import annotations

import argparse
import logging
import math
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pandas as pd
import torch
from lightning_fabric import Fabric
from lightning_fabric.plugins.environments import SLURMEnvironment, TorchElasticEnvironment
from omegaconf import OmegaConf

from ldm.diffusion.trainable import TRAIN_METHODS
from ldm.io.tensors import check_base_model
from ldm.config.concepts import CATEGORIES, parse_erase_targets
from ldm.io.paths import REPO_ROOT
from ldm.erasure.erase import ExecutionConfig, erase_concepts
from ldm.erasure.export import FORMATS
from ldm.ledger.ledger import HISTORY_FILE, Ledger
from ldm.erasure.methods import METHODS
from ldm.metrics.tables import to_markdown
from ldm.config.models import load_model_config
from ldm.diffusion.load import load_model, resolve_config_dir, resolve_names
from ldm.diffusion.model import DiffusionModel
from ldm.erasure.memory import estimate_memory
from ldm.io.sharding import Shard
from ldm.io.paths import ArtifactPaths


Namespace = argparse.Namespace
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message: str):
        print(f"{self.prog}: error: {message} (see --help)", file=sys.stderr)
        sys.exit(2)


def parser(description: str) -> Parser:
    return Parser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)


def add_commands(parser: Parser, root: Path, **runs: Callable[[Namespace], None]) -> dict[str, Parser]:
    """A parser for each command of a script, by name, all with --root; `args.run` is what it runs."""
    commands, made = parser.add_subparsers(required=True, metavar="{" + ",".join(runs) + "}"), {}
    for name, run in runs.items():
        made[name] = commands.add_parser(name, formatter_class=parser.formatter_class)
        made[name].add_argument("--root", type=Path, default=root, help="the ledger's folder")
        made[name].set_defaults(run=run)
    return made


def add_category(parser: Parser) -> None:
    parser.add_argument("--erase_cat", choices=CATEGORIES, default="style", help="which concepts the indexes count")


def add_device(parser: Parser, flag: str = "--device") -> None:
    several = "; of several, such as 0,1, the second runs the frozen model" if flag == "--devices" else ""
    parser.add_argument(flag, default=None,
                        help=f"cpu, cuda:0 or 0{several}; without it CUDA if there is one, else cpu")


def add_dtype(parser: Parser) -> None:
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="what the U-Net is held in; shifts are float32")


def add_model(parser: Parser) -> None:
    """--model and the CompVis pair of the original."""
    parser.add_argument("--model", default=str(REPO_ROOT / "models" / "mini-sd"), help="a diffusers folder or a hub id")
    parser.add_argument("--ckpt_path", default=None, help="instead, a checkpoint in CompVis' layout: .ckpt or .safetensors")
    parser.add_argument("--config_path", default=None, help="what that is made of (default: Stable Diffusion v1)")


def add_scene(parser: Parser) -> None:
    parser.add_argument("--scenei", type=int, default=1, help="scene, part of where bases and shifts are kept")
    parser.add_argument("--timei", type=int, default=0, help="time in the scene, likewise")
    parser.add_argument("--shifts_path", type=Path, default=REPO_ROOT / "models", help="where they are kept, by method")


def add_merge(parser: Parser, required: bool = False) -> None:
    """--merge and the method whose shifts its indexes mean."""
    parser.add_argument("--merge", default="", required=required,
                        help="shifts to merge: indexes such as 0,1,2, or shift files" + ("" if required else "; none: original"))
    parser.add_argument("--method", choices=METHODS, default="SRS-ME", help="whose shifts the indexes mean")


def add_export(parser: Parser) -> None:
    """What `show_export` shows: in which formats weights are written, and how."""
    parser.add_argument("--format", type=formats, default="diffusers", help=f"one or more of {','.join(FORMATS)}")
    parser.add_argument("--dtype", choices=DTYPES, default="float32",
                        help="what the weights are written in; a compvis checkpoint keeps its own unless this is a half")
    parser.add_argument("--rank", type=rank, default=None, help="directions that each shift keeps, or auto for the fewest with "
                        "--share of its effect (default: auto for lora and kohya, all for merged weights)")
    parser.add_argument("--share", type=float, default=0.85, help="of the effect on the concept's own prompts, for --rank auto")


def show_export(table: pd.DataFrame, report: list[dict], targets: list[Path]) -> None:
    """Print what `ldm.export.export` returns."""
    print(to_markdown(table.reset_index()))
    if report:
        print(f"\n{to_markdown(pd.DataFrame(report))}")
    for target in targets:
        print(f"-> {target}")


def positive(text: str) -> int:
    """argparse type: a whole number from 1."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number from 1")
    return int(text)


def from_zero(text: str) -> int:
    """argparse type: a whole number from 0."""
    return 0 if text == "0" else positive(text)


def number(text: str) -> float:
    """argparse type: a number from 0."""
    try:
        found = float(text)
    except ValueError:
        found = math.nan
    if not 0 <= found < math.inf:
        raise argparse.ArgumentTypeError(f"'{text}' is not a number from 0")
    return found


def positive_number(text: str) -> float:
    """argparse type: a number above 0."""
    found = number(text)
    if not found:
        raise argparse.ArgumentTypeError(f"'{text}' is not above 0")
    return found


def one_of(*resolve_names: str) -> Callable[[str], str]:
    """argparse type: one of `names`."""
    def chosen(text: str) -> str:
        if text not in resolve_names:
            raise argparse.ArgumentTypeError(f"'{text}' is none of {', '.join(resolve_names)}")
        return text
    return chosen


# A method's settings that are flags of its script; where one is left out, the model's config gives the value.
SETTINGS = {
    "lr": (float, "Adam's rate"), "iter_break": (from_zero, "most steps; 0 stops at the closed form, and needs no pictures"),
    "batch_size": (positive, "latents a step"),
    "scale_factor": (float, "beta, the basis' scale"), "reg_beta": (float, "weight of |dW|_1"),
    "threshold": (float, "stop when the momentum of the correlation falls to it"),
    "max_base": (positive, "most basis vectors, those that the concept reaches most"),
    "templates": (from_zero, "caption templates to erase beside the bare name"),
    "init": (one_of("closed-form", "zero"), "what to start from: the closed form, which gives the concept its anchor's keys and "
             "values, or zero"),
    "ridge": (positive_number, "weight of |dW|^2, relative to how far the concept reaches"),
    "keep": (number, "weight of how far the protected prompts move, where the tolerance lets them"),
    "spare": (number, "weight of how far the words of the model's vocabulary move, other than the concept's own"),
    "anchor": (one_of("blank", "template"), "what the closed form makes of the concept: the blank prompt, or its category's anchor"),
    "train_method": (str, f"which weights to train: {', '.join(TRAIN_METHODS)}"),
    "start_guidance": (float, "guidance with which the training latents are drawn"),
    "negative_guidance": (float, "eta, how far to turn away from the concept"),
    "ddim_steps": (positive, "sampler steps of the training latents")}


LEARNING = ("lr", "batch_size", "reg_beta", "threshold")  # what acts only while something is learnt


def add_erasure(parser: Parser, *flags: str) -> None:
    """What every erasure takes, and those of a method's settings that `flags` names."""
    add_model(parser)
    add_category(parser)
    parser.add_argument("--erased_index", default="", help="concepts to erase, such as 0, 0,1,2 or 0-8")
    add_scene(parser)
    add_settings(parser, *flags)
    parser.add_argument("--gradient_checkpointing", action="store_true", help="less memory for a third more time")
    add_device(parser, "--devices")


def add_settings(parser: Parser, *flags: str) -> None:
    """Those of a method's settings that `flags` names, the pictures it learns from, and its seed."""
    for flag in flags:
        kind, text = SETTINGS[flag]
        parser.add_argument(f"--{flag}", type=kind, default=None, help=f"{text} (default: the model's config)")
    parser.add_argument("--data_path", type=Path, default=REPO_ROOT / "data", help="has a folder of images per concept")
    parser.add_argument("--seed", type=int, default=0)


def erase(args: Namespace, method: str) -> None:
    """Run a method on the concepts of --erased_index, and print what it took."""
    concepts, devices = parse_erase_targets(args.erased_index, args.erase_cat), parse_devices(args.devices)
    device, share = join(devices[0])
    effort = ExecutionConfig(devices[1] if len(devices) > 1 else None, args.gradient_checkpointing)
    model = load_model(args, device, getattr(args, "dtype", "float32"))  # which SRS_ME.py alone asks for
    given = given_settings(args, model.base, method)
    unused = [f"--{name}" for name in LEARNING if getattr(args, name, None) is not None]
    if not given["iter_break"] and unused:
        print(f"{', '.join(unused)}: not used, since nothing is learnt: --iter_break, here 0, is the most steps")
    rows = erase_concepts(model, store(args, model.name, method), concepts, given, args.data_path, effort, share)
    if rows:
        print(to_markdown(pd.DataFrame(rows)))


def given_settings(args: Namespace, base: str, method: str) -> dict:
    """A method's settings in the config of model `base`, with those that flags gave."""
    given = methods_settings(base, [])[method] | {"seed": args.seed}
    return given | {name: value for name, value in vars(args).items() if name in given and value is not None}


def foresee(args: Namespace, method: str) -> pd.DataFrame:
    """The table of `plan` for what the arguments say."""
    source = args.ckpt_path or args.model
    try:
        folder = resolve_config_dir(source, args.config_path)
        given = given_settings(args, resolve_names(source, args.config_path)[1], method)
        return estimate_memory(folder, parse_devices(args.devices)[0], given["batch_size"], given["max_base"])
    except (OSError, KeyError) as error:
        raise ValueError(f"no configs of a model in '{source}': pass --model a diffusers folder, or --ckpt_path a checkpoint") from error


@contextmanager
def memory_explained(args: Namespace, method: str) -> Iterator[None]:
    """While the block runs, running out of memory ends in the table of `foresee` and a ValueError."""
    try:
        yield
    except (torch.OutOfMemoryError, RuntimeError) as error:
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        print(f"predicted peak memory, GiB:\n{to_markdown(foresee(args, method))}")
        raise ValueError("out of memory, and nothing was lost: choose a smaller row of the table, such as --dtype bfloat16 "
                         "--gradient_checkpointing, or a smaller --batch_size, or another device") from error


def add_sampling(parser: Parser, samples: int | None = None) -> None:
    if samples:
        parser.add_argument("--num_samples", type=positive, default=samples, help="images for each seed")
    parser.add_argument("--ddim_steps", type=positive, default=None, help="sampler steps (default: the model's config)")
    parser.add_argument("--guidance_scale", type=float, default=None, help="guidance (default: the model's config)")
    parser.add_argument("--batch_size", type=positive, default=None, help="images at once (default: the model's config)")


def add_compile(parser: Parser) -> None:
    parser.add_argument("--compile", action="store_true", help="draw by torch.compile: faster after minutes of compiling, for thousands "
                        "of images")


def add_inception(parser: Parser) -> None:
    parser.add_argument("--inception_path", type=Path, default=None,
                        help="FID's Inception weights (torch-fidelity's .pth); without them AlexNet's features")


def parse_numbers(text: str, flag: str = "--values", least: int = 2) -> list[float]:
    """'0,1e-6' -> numbers. Raises ValueError for anything else, or fewer than `least` different ones."""
    try:
        numbers = list(dict.fromkeys(float(piece) for piece in text.split(",")))
    except ValueError:
        numbers = [math.nan]
    if not all(map(math.isfinite, numbers)):
        raise ValueError(f"{flag} {text}: give numbers such as 0,1e-6")
    if len(numbers) < least:
        raise ValueError(f"{flag} {text}: give two different numbers or more, such as 0,1e-6")
    return numbers


def formats(text: str) -> list[str]:
    """argparse type: names of `FORMATS`, separated by commas, in the order in which they are written."""
    wanted = [piece.strip() for piece in text.split(",") if piece.strip()]
    unknown = [name for name in wanted if name not in FORMATS]
    if unknown or not wanted:
        raise argparse.ArgumentTypeError(f"'{text}' names no format: choose from {', '.join(FORMATS)}")
    return [name for name in FORMATS if name in wanted]


def rank(text: str) -> int | str:
    """argparse type: a whole number from 1, or auto."""
    return text if text == "auto" else positive(text)


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


def join(device: torch.device) -> tuple[torch.device, Shard]:
    """This process's device, and its share of the work: of the processes that torchrun or SLURM has started together, one for
    each device, and of the tasks of a SLURM job array.

    Raises ValueError where several processes are told to take the same GPU.
    """
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message="The `srun` command")
    rank, size = 0, 1
    try:
        environment = next((kind() for kind in (TorchElasticEnvironment, SLURMEnvironment) if kind.detect()), None)
    except RuntimeError as error:  # Lightning's, which names the flag of sbatch to use instead
        raise ValueError(str(error)) from error
    if environment and environment.world_size() > 1:
        nodes = int(os.environ.get("SLURM_NNODES", 1)) if isinstance(environment, SLURMEnvironment) else \
            environment.world_size() // int(os.environ["LOCAL_WORLD_SIZE"])
        if device.index is not None:
            raise ValueError(f"device {device} would be that of all {environment.world_size()} processes: leave the flag out, so that "
                             "each takes its own, or give cpu")
        fabric = Fabric(accelerator=device.type, devices=environment.world_size() // nodes, num_nodes=nodes, strategy="ddp")
        fabric.launch()
        rank, size, device = fabric.global_rank, fabric.world_size, fabric.device
    tasks = int(os.environ.get("SLURM_ARRAY_TASK_COUNT", 1))
    task = int(os.environ.get("SLURM_ARRAY_TASK_ID", 0)) - int(os.environ.get("SLURM_ARRAY_TASK_MIN", 0))
    if not 0 <= task < tasks:
        raise ValueError("the tasks of the job array are not numbered one by one: pass such as --array=0-3 to sbatch")
    return device, Shard(task * size + rank, tasks * size)


def methods_settings(base: str, changes: list[str]) -> dict[str, dict]:
    """The settings of every method in the config of model `base`, changed by such as `FMN.lr=1e-2`.

    Raises ValueError when a change names no setting.
    """
    given = OmegaConf.to_container(load_model_config(base).erasure)
    for change in changes:
        place, _, text = change.partition("=")
        method, _, name = place.partition(".")
        try:
            if name not in given[method]:
                raise ValueError
            kind = positive if name == "iter_break" and "init" not in given[method] else SETTINGS[name][0]
            given[method][name] = kind(text)
        except (KeyError, ValueError, argparse.ArgumentTypeError):
            raise ValueError(f"--settings {change}: give METHOD.SETTING=VALUE as in the model's config, such as FMN.lr=1e-2") from None
    return given


def load_model(args: Namespace, device: torch.device, dtype: str = "float32") -> DiffusionModel:
    """The model that --ckpt_path (with --config_path) or --model names, its U-Net in `dtype`."""
    return load_model(args.ckpt_path or args.model, device, args.config_path, DTYPES[dtype])


def ledger_at(args: Namespace, path: Path) -> Ledger:
    """The ledger in a folder, or file; where no model is given, `args` get the ledger's."""
    ledger = Ledger(path if path.suffix == ".jsonl" else path / HISTORY_FILE)
    if not args.model and not args.ckpt_path:
        args.model = ledger.header.get("model") or str(REPO_ROOT / "models" / "mini-sd")
        args.ckpt_path, args.config_path = (ledger.header.get(name) for name in ("ckpt_path", "config_path"))
    return ledger


def open_ledger(args: Namespace, path: Path) -> tuple[Ledger, DiffusionModel]:
    """The ledger in a folder, or file, and its model, or the one of the same digest that --model names."""
    ledger = ledger_at(args, path)
    model = load_model(args, parse_devices(args.device)[0])
    check_base_model(ledger.header, model.digest, ledger.path)
    return ledger, model


def fill(args: Namespace, load_model_config) -> None:
    """Give every argument that was left out its value from the model's config."""
    for name, value in load_model_config.items():
        if getattr(args, name, value) is None:
            setattr(args, name, value)


def store(args: Namespace, model_name: str, method: str) -> ArtifactPaths:
    return ArtifactPaths(args.shifts_path, method, model_name, args.erase_cat, args.scenei, args.timei)


def default_data(category: str, root: Path = REPO_ROOT / "data") -> Path:
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
