"""Running a script: the one place where an exception becomes a line on stderr and exit code 2."""

from __future__ import annotations

import atexit
import errno
import gc
import os
import re
import shlex
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from ldm.cli.arguments import MODEL_ARGUMENTS, spelled, typed
from ldm.cli.output import printing
from ldm.config.concepts import CATEGORIES, OWN
from ldm.io.errors import MissingFileError, NotErasedError, Notice

METHOD_SCRIPTS = {
    "SRS-ME": "SRS_ME.py",
    "SRS-ME-dagger": "SRS_ME.py --joint",
    "SRS-ME-double-dagger": "CiE.py",
    "FMN": "FMN.py",
    "AbConcept": "Abconcept.py",
    "ESD": "Esd.py",
    "UCE": "UCE.py",
    "SPEED": "SPEED.py",
}
_PLACE = "{target} --scene {scene} --scene_time {scene_time}"
_MAKERS = {  # what makes a missing file, by its kind
    "prompts": "make one with python eval-scripts/make-prompts.py",
    "basis": f"make it with python train-scripts/SRSME_Solution.py {_PLACE} --em_indexes ...",
    "shift": f"make it with python train-scripts/{{script}} {_PLACE}",
    "training images": "make them with python eval-scripts/generate-data.py{category_flag} "
    "--prompt {concept} --source model",
    "generated images": "make them with python eval-scripts/generate-images-merge.py",
    "classifier": "train it with python train-scripts/artist-cls-train.py{category_flag}",
    "classifier data": "make them with python eval-scripts/generate-data.py",
    "lpips weights": "make them with python train-scripts/convert-lpips.py",
    "ledger": "begin one with python train-scripts/ledger.py init --ledger_dir {ledger_dir}",
}

# Flags that the command which makes it takes over, where they were typed.
_TAKEN_OVER = {
    "basis": (*MODEL_ARGUMENTS, "artifacts_dir"),
    "shift": (*MODEL_ARGUMENTS, "artifacts_dir"),
    "training images": MODEL_ARGUMENTS,
    "classifier data": ("category",),
}


def run(main: Callable[[], None]) -> None:
    """Run a script's main. Bad input ends in one line on stderr and exit code 2; SRSME_TRACEBACK=1 shows where.

    What is made, and does not do what may be called erased, ends in one line and exit code 3.
    A batch system's SIGTERM ends it like Ctrl-C, so that half-written files are removed.
    """
    _received.clear()
    signal.signal(signal.SIGTERM, _stop)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # and not one that ignores it, as under nohup
        signal.signal(signal.SIGINT, _stop)
    try:
        with warnings.catch_warnings(), printing(), _late_collection():
            warnings.simplefilter("always", Notice)  # each text once, which `_show_notices` sees to
            _show_notices()
            main()
        if sys.stdout:  # which is None where it was closed
            sys.stdout.flush()
    except KeyboardInterrupt:
        _exit_stopped()
    except BrokenPipeError:  # who reads the output has gone, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
    except NotErasedError as error:
        print(f"{Path(sys.argv[0]).name}: not erased: {as_typed(str(error))}", file=sys.stderr)
        sys.exit(3)
    except Exception as error:
        if _received:  # a library that was being imported made another error of it
            _exit_stopped()
        if os.environ.get("SRSME_TRACEBACK") or not _is_users(error):
            raise
        print(f"{Path(sys.argv[0]).name}: error: {explain(error)}", file=sys.stderr)
        _drop_unwritten()
        sys.exit(2)


def _drop_unwritten() -> None:
    """Give up what stdout cannot take, as on a full disk: written at the end, it would be another error."""
    try:
        if sys.stdout:
            sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


# What is there when a process ends is not looked through for cyclic garbage: after imports of torch that took a second.
atexit.register(gc.freeze)
_FIRST_LOOK = 1_000_000  # objects: more than imports of torch and diffusers make


@contextmanager
def _late_collection() -> Iterator[None]:
    """While the block runs, let the first look for cyclic garbage come late, and all others as usual.

    What is imported stays: to look through it while it is being imported took a tenth of a short command's time.
    """
    usual = gc.get_threshold()

    def look_as_usual(*_: object) -> None:
        gc.set_threshold(*usual)

    gc.callbacks.append(look_as_usual)  # at each look, so from the first one on
    gc.set_threshold(_FIRST_LOOK, *usual[1:])
    try:
        yield
    finally:
        gc.callbacks.remove(look_as_usual)
        gc.set_threshold(*usual)


def _show_notices() -> None:
    """Show each notice as one line on stderr, once, and other warnings as they were shown before."""
    shown: set[str] = set()
    show_others = warnings.showwarning

    def show(message: Warning | str, category: type[Warning], *place: Any, **options: Any) -> None:
        text = as_typed(str(message))
        if not issubclass(category, Notice):
            show_others(message, category, *place, **options)
        elif text not in shown:
            shown.add(text)
            print(f"{Path(sys.argv[0]).name}: notice: {text}", file=sys.stderr)

    warnings.showwarning = show


_received: list[int] = []  # signals that stop a script


def _stop(signal_number: int, _: Any) -> NoReturn:
    _received.append(signal_number)
    raise KeyboardInterrupt


def _exit_stopped() -> NoReturn:
    print("stopped; nothing is half written, and the same command resumes or starts over", file=sys.stderr)
    sys.exit(130)


# What reading or writing a file may raise, or a machine that is too small for it: errors that a user can mend.
_USERS_ERRORS = (ValueError, OSError, EOFError, FloatingPointError, ImportError, MemoryError, RecursionError)
# What the system says of a file, and what to do about it.
_OS_ADVICE = {
    **dict.fromkeys(
        (errno.ENOTDIR, errno.EEXIST), "a file is where a folder should be: choose another path, or remove it"
    ),
    errno.EISDIR: "a folder is where a file should be: give the path of a file",
    errno.ENOENT: "there is no such file or folder: see how it is spelt",
    errno.EACCES: "permission denied: see to who may read and write there",
    errno.EROFS: "the file system is read-only: choose another path",
    errno.ENAMETOOLONG: "the name is too long for this file system: choose a shorter one",
}
_WITHOUT_TEXT: dict[type[Exception], str] = {MemoryError: "out of memory: try a smaller model or fewer images at once"}
_USERS_ERRORS_OF = {  # of libraries that may not have been imported
    "safetensors": ("SafetensorError",),
    "torch": ("OutOfMemoryError",),
    "pickle": ("UnpicklingError",),
    "zipfile": ("BadZipFile",),
    "omegaconf.errors": ("OmegaConfBaseException",),
    "yaml": ("YAMLError",),
}


def _is_users(error: Exception) -> bool:
    """Return whether an error is one that the user of a script can mend, and not a fault of the program."""
    if isinstance(error, _USERS_ERRORS):
        return True
    kinds = []
    for module, names in _USERS_ERRORS_OF.items():
        if module in sys.modules:  # no error comes from a library that was not imported
            kinds += [getattr(sys.modules[module], name) for name in names]
    return isinstance(error, tuple(kinds))


def as_typed(message: str) -> str:
    """Return a message as one line, with the flags that its user typed in place of settings in backticks."""
    return re.sub(r"`(\w+)`", lambda found: spelled.get(found[1], f"--{found[1]}"), " ".join(message.split()))


def _target(details: Mapping[str, object]) -> str:
    """Return the flags that name the concept of a missing basis or shift."""
    if details.get("category") == OWN:
        return f"--concepts {shlex.quote(str(details.get('concept', details.get('erased_index'))))}"
    category, index = (shlex.quote(str(details.get(name))) for name in ("category", "erased_index"))
    return f"--category {category} --erased_index {index}"


def explain(error: Exception) -> str:
    """Return an error as one line, with the flags that its user typed and the command that makes what is missing."""
    message = as_typed(str(error)) or _WITHOUT_TEXT.get(type(error), type(error).__name__)
    if isinstance(error, OSError) and error.errno in _OS_ADVICE and error.filename:
        message = f"{error.filename}: {_OS_ADVICE[error.errno]}"
    if isinstance(error, MissingFileError):
        category = error.details.get("category")
        known = {
            "script": METHOD_SCRIPTS.get(str(error.details.get("method")), ""),
            "target": _target(error.details),
            "category_flag": f" --category {category}" if category in CATEGORIES else "",
        }
        details = {name: shlex.quote(str(value)) for name, value in error.details.items()}
        message += f": {_MAKERS[error.kind].format(**known, **details)}"
        for name in _TAKEN_OVER.get(error.kind, ()):
            if typed.get(name):
                message += f" --{name} {shlex.quote(str(typed[name]))}"
    return message
