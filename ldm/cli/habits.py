"""What every script understands: --version, --quiet, --json where it prints tables, and completion by a shell."""

from __future__ import annotations

import argparse
import tomllib
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from ldm.cli import output
from ldm.io.paths import REPO_ROOT

AnyParser = TypeVar("AnyParser", bound=argparse.ArgumentParser)
PACKAGE = "srs-me"
SHELLS = ("bash", "zsh", "tcsh")
# Arguments that may name a file or a folder, beside all that are paths alone.
_ALSO_PATHS = ("model", "model_name", "ckpt_path", "config_path", "shifts", "groups")
# bash completes by the first word, which is python here: this passes on what follows it to the script's own function.
_AFTER_PYTHON = """\
_srsme_after_python() {
  local script="${COMP_WORDS[1]##*/}"
  local own="_shtab_${script//[^[:word:]]/_}"
  COMPREPLY=()
  if (( COMP_CWORD > 1 )) && declare -F "$own" > /dev/null; then
    COMP_WORDS=("${COMP_WORDS[@]:1}")
    (( COMP_CWORD -= 1 ))
    "$own"
  fi
}
complete -o default -o filenames -F _srsme_after_python python python3
"""


def package_version() -> str:
    """Return the version in the clone's pyproject.toml, or where there is none that of the installed package."""
    path = REPO_ROOT / "pyproject.toml"
    if not path.is_file():
        return version(PACKAGE)
    return tomllib.loads(path.read_text(encoding="utf-8"))["project"]["version"]


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        print(f"{PACKAGE} {package_version()}")
        parser.exit()


class _Quiet(argparse.Action):
    def __call__(self, *_: Any) -> None:
        output.be_quiet()


class _Json(argparse.Action):
    def __call__(self, *_: Any) -> None:
        output.print_json()


class _PrintCompletion(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, _: Any, shell: Any, *__: Any) -> NoReturn:
        import shtab

        _complete_paths(parser)
        print(shtab.complete(parser, shell, preamble=_AFTER_PYTHON if shell == "bash" else ""))
        parser.exit()


def _complete_paths(parser: argparse.ArgumentParser) -> None:
    """Let shtab complete the arguments of a parser, and of its commands, that name files and folders."""
    import shtab

    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                _complete_paths(command)
        elif action.type is Path or action.dest in _ALSO_PATHS:
            vars(action)["complete"] = shtab.FILE


def add_habits(parser: AnyParser) -> AnyParser:
    """Add what every script understands, and return its parser."""
    parser.add_argument(
        "--version", action=_Version, nargs=0, default=argparse.SUPPRESS, help="print the version, and end"
    )
    text = "print a script for a shell that completes this script's flags, and end"
    parser.add_argument(
        "--print_completion", action=_PrintCompletion, choices=SHELLS, default=argparse.SUPPRESS, help=text
    )
    return parser


def add_quiet(parser: argparse.ArgumentParser) -> None:
    """Add --quiet for a script, or a command of one."""
    text = "print tables, notices and errors alone, and no progress"
    parser.add_argument("--quiet", action=_Quiet, nargs=0, default=argparse.SUPPRESS, help=text)


def add_json(parser: argparse.ArgumentParser) -> None:
    """Add --json for a script, or a command of one, that prints tables."""
    text = "print tables as JSON, and all else on stderr"
    parser.add_argument("--json", action=_Json, nargs=0, default=argparse.SUPPRESS, help=text)
