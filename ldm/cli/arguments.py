"""The arguments that scripts share, and flags made from settings' fields. No torch here: `--help` answers at once."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import Field, fields
from pathlib import Path
from typing import Any, NoReturn

from ldm.cli import habits
from ldm.cli.flags import OLDER, OLDER_VALUES, ORIGINAL, RENAMED_VALUES
from ldm.config.concepts import CATEGORIES
from ldm.config.methods import (
    DTYPES,
    FORMATS,
    METHODS,
    ExportConfig,
    NullSpaceConfig,
    SamplingConfig,
    SRSMEConfig,
)
from ldm.config.settings import Settings, check_value, did_you_mean
from ldm.io.errors import notify
from ldm.io.files import check_writable
from ldm.io.paths import REPO_ROOT

Namespace = argparse.Namespace
DEFAULT_MODEL = REPO_ROOT / "models" / "mini-sd"
MODEL_ARGUMENTS = ("model", "ckpt_path", "config_path", "variant")  # those of `add_model`
FROM_CONFIG = "(default: the model's config)"

spelled: dict[str, str] = {}  # the flags as the user typed them, by the name of the argument
typed: dict[str, Any] = {}  # and the values that they were given


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Show a default where there is one to show."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default in ([], "") or isinstance(action.default, bool):
            return action.help
        return super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """An argument parser whose flags have other spellings, and whose errors are one line."""

    def __init__(self, **options: Any):
        options.setdefault("formatter_class", _HelpFormatter)
        super().__init__(allow_abbrev=False, **options)
        habits.add_quiet(self)

    def option(self, name: str, original: Sequence[str] = (), **options: Any) -> None:
        """Add `--name`, spelled as in `ldm.cli.flags` too: the original's spellings, or those here, are shown."""
        original = original or ORIGINAL.get(name, ())
        action = self.add_argument(f"--{name}", *original, dest=name, **options)
        for flag in OLDER.get(name, ()):
            self._option_string_actions.setdefault(flag, action)

    def accept_unused(self, *names: str) -> None:
        """Take options of an older version that never had an effect, hidden, and say so when one is typed."""

        class Unused(argparse.Action):
            def __call__(self, parser: argparse.ArgumentParser, *given: Any) -> None:
                notify(f"{given[-1]}: not used, and without effect here")

        for name in names:
            self.option(name, action=Unused, nargs="*", default=argparse.SUPPRESS, help=argparse.SUPPRESS)

    def retire(self, flag: str, advice: str) -> None:
        """Let `flag`, whose meaning has changed, end in one line that says what to give instead."""

        class Retired(argparse.Action):
            def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
                parser.error(advice)

        self.add_argument(flag, action=Retired, nargs="*", help=argparse.SUPPRESS, dest=argparse.SUPPRESS)

    # argparse's is overloaded, which this stands for in one signature
    def parse_known_args(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, args: Any = None, namespace: Any = None
    ) -> Any:
        texts = sys.argv[1:] if args is None else list(args)
        has_commands = any(isinstance(action, argparse._SubParsersAction) for action in self._actions)
        for text in texts:
            flag = text.split("=")[0]
            if flag in self._option_string_actions:
                spelled[self._option_string_actions[flag].dest] = flag
            elif re.fullmatch(r"--[\w-]+", flag) and not has_commands:
                self.error(f"unrecognized argument {flag}{did_you_mean(flag, list(self._option_string_actions))}")
        parsed, others = super().parse_known_args(args, namespace)
        typed.update({name: value for name, value in vars(parsed).items() if name in spelled})
        for name in ("save_path", "export_dir"):  # before the work whose results go there
            if isinstance(getattr(parsed, name, None), Path):
                check_writable(getattr(parsed, name), name)
        return parsed, others

    def error(self, message: str) -> NoReturn:
        named = re.match(r"argument (--[^:]+): ", message)
        if named:  # as the user typed it, and not in every spelling
            action = self._option_string_actions[named[1].split("/")[0].split(", ")[0]]
            message = f"argument {spelled.get(action.dest, named[1])}: {message[named.end() :]}"
        print(f"{self.prog}: error: {' '.join(message.split())} (see --help)", file=sys.stderr)
        sys.exit(2)


def make_parser(description: str | None) -> Parser:
    """Return a parser for a script whose docstring is `description`; what an earlier one was given is forgotten."""
    spelled.clear()
    typed.clear()
    return habits.add_habits(Parser(description=description))


def add_commands(parser: Parser, ledger_dir: Path, **runs: Callable[[Namespace], None]) -> dict[str, Parser]:
    """Return a parser for each command of a script, by name, all with `--ledger_dir`; `args.run` is what it runs."""
    subparsers = parser.add_subparsers(required=True, metavar="{" + ",".join(runs) + "}")
    commands: dict[str, Parser] = {}
    for name, run in runs.items():
        commands[name] = subparsers.add_parser(name, help=run.__doc__)
        commands[name].option("ledger_dir", type=Path, default=ledger_dir, help="the ledger's folder")
        commands[name].set_defaults(run=run)
    return commands


# Types of single arguments.


def _whole_number(text: str, minimum: int) -> int:
    if not re.fullmatch("[0-9]{1,19}", text) or not minimum <= int(text) < 2**63:
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number from {minimum}")
    return int(text)


def positive_int(text: str) -> int:
    """Return a whole number from 1."""
    return _whole_number(text, 1)


def nonnegative_int(text: str) -> int:
    """Return a whole number from 0."""
    return _whole_number(text, 0)


def parse_float(text: str) -> float:
    """Return a number that is written in digits, such as 0.5 or 1e-6."""
    if not re.fullmatch(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?|[+-]?(inf|nan)", text):
        raise argparse.ArgumentTypeError(f"'{text}' is not a number")
    return float(text)


def choice(*names: str) -> Callable[[str], str]:
    """Return a type that takes one of `names`, also as it was spelt before."""

    def chosen(text: str) -> str:
        for older in OLDER_VALUES.values():
            if text in older and older[text] in names:
                return older[text]
        if text not in names:
            raise argparse.ArgumentTypeError(f"'{text}' is none of {', '.join(names)}")
        return text

    return chosen


def parse_numbers(text: str, name: str, minimum: int = 2) -> list[float]:
    """Return the numbers in such as '0,1e-6', `minimum` different ones or more. Raises ValueError for anything else."""
    numbers: list[float] = []
    with suppress(ValueError):
        numbers = list(dict.fromkeys(float(piece) for piece in text.split(",")))
    if not numbers or not all(abs(number) < float("inf") for number in numbers):
        raise ValueError(f"`{name}` {text}: give numbers such as 0,1e-6")
    if len(numbers) < minimum:
        raise ValueError(f"`{name}` {text}: give two different numbers or more, such as 0,1e-6")
    return numbers


def parse_formats(text: str) -> tuple[str, ...]:
    """Return the export formats in such as 'unet,lora'."""
    formats = [piece.strip() for piece in text.split(",") if piece.strip()]
    unknown = [name for name in formats if name not in FORMATS]
    if unknown or not formats:
        raise argparse.ArgumentTypeError(f"'{text}' names no format: choose from {', '.join(FORMATS)}")
    return tuple(formats)


def parse_rank(text: str) -> int | str:
    """Return a whole number from 1, or auto."""
    return text if text == "auto" else positive_int(text)


def setting_type(entry: Field[Any]) -> Callable[[str], Any]:
    """Return what reads a text as the value of a settings field, within the field's limits."""

    def parse(text: str) -> Any:
        renamed = RENAMED_VALUES.get(entry.name, {})
        if text in renamed:
            raise argparse.ArgumentTypeError(f"'{text}' is called {renamed[text]} today")
        value: Any = OLDER_VALUES.get(entry.name, {}).get(text, text)
        kind = str(entry.type)
        if kind.startswith("int"):
            return _whole_number(text, int(entry.metadata["minimum"] or 0))
        if kind.startswith("float"):
            value = parse_float(text)
        try:
            check_value(entry.name, value, entry.metadata)
        except ValueError as error:
            reason = str(error).removeprefix(f"`{entry.name}` ").replace(f"'{value}'", f"'{text}'")
            raise argparse.ArgumentTypeError(reason) from error
        return value

    return parse


def add_settings(parser: Parser, kind: type[Settings], *names: str) -> None:
    """Add a flag for each field of a settings class, or those in `names`; without one the model's config decides."""
    for entry in fields(kind):
        if (names and entry.name not in names) or entry.name in {action.dest for action in parser._actions}:
            continue
        listed = f": {', '.join(entry.metadata['choices'])}" if entry.metadata["choices"] else ""
        text = f"{entry.metadata['help']}{listed} {FROM_CONFIG}"
        parse: Callable[[str], Any] = setting_type(entry)
        if entry.name == "max_steps" and issubclass(kind, SRSMEConfig):
            parse, text = nonnegative_int, f"{entry.metadata['help']}; 0 is --mode closed_form {FROM_CONFIG}"
        if entry.type == "bool":
            parser.option(entry.name, action=argparse.BooleanOptionalAction, default=None, help=text)
        else:
            parser.option(entry.name, type=parse, default=None, help=text)


def add_settings_with_defaults(parser: Parser, settings: Settings, **original: Sequence[str]) -> None:
    """Add a flag for each field of settings that no model's config decides: without one its value stays.

    `original` has further spellings of the original by field, those of this script alone.
    """
    for entry in fields(settings):
        default, spellings = getattr(settings, entry.name), original.get(entry.name, ())
        text = entry.metadata["help"]
        parser.option(entry.name, original=spellings, type=setting_type(entry), default=default, help=text)


def typed_settings(args: Namespace, kind: type[Settings]) -> dict[str, Any]:
    """Return the values of a settings class that were typed."""
    values = {entry.name: getattr(args, entry.name, None) for entry in fields(kind)}
    return {name: value for name, value in values.items() if value is not None}


# Groups of arguments.


def add_category(parser: Parser) -> None:
    """Add --category."""
    parser.option("category", choices=CATEGORIES, default="style", help="which concepts the indexes count")


def add_device(parser: Parser) -> None:
    """Add --device."""
    parser.option("device", default=None, help="cpu, cuda:0 or 0; without it CUDA if there is one, else cpu")


def add_unet_dtype(parser: Parser) -> None:
    """Add --unet_dtype."""
    parser.option(
        "unet_dtype", choices=DTYPES, default="float32", help="what the denoiser is held in; shifts are float32"
    )


def add_model(parser: Parser, default: str | None = str(DEFAULT_MODEL)) -> None:
    """Add --model and the CompVis pair of the original."""
    parser.option("model", default=default, help="a diffusers folder or a hub id")
    parser.option("ckpt_path", default=None, help="instead, a checkpoint in CompVis' layout: .ckpt or .safetensors")
    parser.option("config_path", default=None, help="what that is made of (default: Stable Diffusion v1)")
    add_variant(parser)


def add_variant(parser: Parser) -> None:
    """Add --variant."""
    text = "which of a diffusers folder's weights, such as fp16 for NAME.fp16.safetensors (default: NAME.safetensors)"
    parser.option("variant", default=None, help=text)


def add_artifacts(parser: Parser) -> None:
    """Add where bases and shifts are kept."""
    add_scene(parser)
    parser.option("artifacts_dir", type=Path, default=REPO_ROOT / "models", help="where they are kept, by method")


def add_scene(parser: Parser) -> None:
    """Add the scene and the time in it, by which bases and shifts are kept."""
    parser.option("scene", type=nonnegative_int, default=1, help="scene, part of where bases and shifts are kept")
    parser.option("scene_time", type=nonnegative_int, default=0, help="time in the scene, likewise")


def add_shifts(parser: Parser, required: bool = False, purpose: str = "merge", without: str = "original model") -> None:
    """Add --shifts, for a `purpose`, and the method whose shifts its indexes mean."""
    text = f"shifts to {purpose}: names such as 'Greg Rutkowski', indexes such as 0,1,2, or shift files"
    text += "" if required else f"; none: the {without}"
    parser.option("shifts", nargs="*", default=[], required=required, help=text)
    parser.option("method", choices=METHODS, default="SRS-ME", help="whose shifts the indexes mean")


def add_export(parser: Parser) -> None:
    """Add the fields of `ExportConfig`."""
    texts = {entry.name: entry.metadata["help"] for entry in fields(ExportConfig)}
    defaults = ExportConfig()
    parser.option("format", type=parse_formats, default=defaults.formats[0], help=texts["formats"])
    parser.option("save_dtype", choices=DTYPES, default=defaults.save_dtype, help=texts["save_dtype"])
    parser.option("rank", type=parse_rank, default=None, help=texts["rank"])
    parser.option("effect_fraction", type=parse_float, default=defaults.effect_fraction, help=texts["effect_fraction"])


def export_config(args: Namespace) -> ExportConfig:
    """Return what `add_export`'s arguments say."""
    return ExportConfig(args.format, args.save_dtype, args.rank, args.effect_fraction)


def add_training_images(parser: Parser) -> None:
    """Add --training_image_dir."""
    parser.option(
        "training_image_dir", type=Path, default=REPO_ROOT / "data", help="has a folder of images per concept"
    )


def add_null_space(parser: Parser) -> None:
    """Add the settings of a null space; --rank_rtol also takes the word exact."""
    tolerance = next(entry for entry in fields(NullSpaceConfig) if entry.name == "rank_rtol")
    exact = NullSpaceConfig().rank_rtol

    def parse_tolerance(text: str) -> float:
        return exact if text == "exact" else setting_type(tolerance)(text)

    text = f"{tolerance.metadata['help']}, or exact for {exact} {FROM_CONFIG}"
    parser.option("rank_rtol", type=parse_tolerance, default=None, help=text)
    add_settings(parser, NullSpaceConfig)


def add_sampling(parser: Parser, images_per_seed: int | None = None) -> None:
    """Add the settings of a sampler, and how many images a seed gets where several may be asked for."""
    if images_per_seed:
        parser.option("images_per_seed", type=positive_int, default=images_per_seed, help="images for each seed")
    add_settings(parser, SamplingConfig)


def named_file(text: str) -> tuple[str, Path]:
    """Return the name and the file in such as captions=data/everyday_captions.csv."""
    name, _, path = text.partition("=")
    if not name or not path:
        raise argparse.ArgumentTypeError(f"'{text}' is not NAME=FILE, such as captions=data/everyday_captions.csv")
    return name, Path(path)


def add_compile(parser: Parser) -> None:
    """Add --compile."""
    text = "generate by torch.compile: faster after minutes of compiling, for thousands of images"
    parser.option("compile", action="store_true", help=text)


def add_prompt_list(parser: Parser) -> None:
    """Add the prompts of a generation, and where its images go."""
    parser.option("prompts_path", type=Path, default=None, help="CSV: prompt,evaluation_seed,case_number")
    parser.option("prompts", nargs="+", default=[], help="instead, prompts themselves, such as 'a red fox' 'a dog'")
    text = "images of each of --prompts, from as many seeds"
    parser.option("seeds_per_prompt", type=positive_int, default=1, help=text)
    parser.option("save_path", type=Path, required=True, help="folder for the image folders")
    parser.option("start_case", type=nonnegative_int, default=0, help="leave out lower case numbers")


def add_image_pair(parser: Parser) -> None:
    """Add the two image folders that are compared."""
    parser.option("original_dir", type=Path, required=True, help="images of the original model")
    parser.option("edited_dir", type=Path, required=True, help="images of the edited model")


def add_ledger(parser: Parser) -> None:
    """Add the ledger that a page is about."""
    default = REPO_ROOT / "models" / "ledger"
    text = "a ledger's folder, or its .jsonl file"
    parser.add_argument("ledger", type=Path, nargs="?", default=default, help=text)


def add_image_dir(parser: Parser) -> None:
    """Add the image folder that is sorted or classified."""
    default = REPO_ROOT / "evaluation_folder" / "ori-merge"
    parser.option("image_dir", type=Path, default=default, help="the images")


def add_image_prompts(parser: Parser) -> None:
    """Add the prompt list that images were generated from."""
    text = "the images' prompt list (default: prompts.csv in their folder)"
    parser.option("prompts_path", type=Path, default=None, help=text)


def add_inception(parser: Parser) -> None:
    """Add --inception_weights."""
    text = "FID's Inception weights (torch-fidelity's .pth); without them AlexNet's features"
    parser.option("inception_weights", type=Path, default=None, help=text)


def add_imagenet(parser: Parser) -> None:
    """Add --imagenet_weights."""
    text = "for objects, as in the paper: a state dict of torchvision's ImageNet ResNet50 to classify by"
    parser.option("imagenet_weights", type=Path, default=None, help=text)


def add_classifier(parser: Parser) -> None:
    """Add --classifier."""
    parser.option("classifier", type=Path, default=None, help="default: models/classifiers/CATEGORY.safetensors")


def default_data_dir(category: str, root: Path = REPO_ROOT / "data") -> Path:
    """Return where a category's train and eval folders are: `root` for styles, else root/CATEGORY."""
    return root if category == "style" else root / category
