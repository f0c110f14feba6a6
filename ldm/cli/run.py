"""Running a script: the one place where an exception becomes a line on stderr and exit code 2."""

from __future__ import annotations

import os
import re
import shlex
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from ldm.cli.arguments import MODEL_ARGUMENTS, spelled, typed
from ldm.config.concepts import CATEGORIES
from ldm.io.errors import MissingFileError

METHOD_SCRIPTS = {
    "SRS-ME": "SRS_ME.py",
    "SRS-ME-dagger": "SRS_ME.py --joint",
    "SRS-ME-double-dagger": "CiE.py",
    "FMN": "FMN.py",
    "AbConcept": "Abconcept.py",
    "ESD": "Esd.py",
}
_PLACE = "--category {category} --erased_index {erased_index} --scene {scene} --scene_time {scene_time}"
_MAKERS = {  # what makes a missing file, by its kind
    "prompts": "make one with python eval-scripts/make-prompts.py",
    "basis": f"make it with python train-scripts/SRSME_Solution.py {_PLACE} --em_indexes ...",
    "shift": f"make it with python train-scripts/{{script}} {_PLACE}",
    "training images": "make them with python eval-scripts/generate-data.py --category {category} "
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

    A batch system's SIGTERM ends it like Ctrl-C, so that half-written files are removed.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        main()
    except KeyboardInterrupt:
        print("stopped; nothing is half written, and the same command resumes or starts over", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        if os.environ.get("SRSME_TRACEBACK") or not _is_users(error):
            raise
        print(f"{Path(sys.argv[0]).name}: error: {explain(error)}", file=sys.stderr)
        sys.exit(2)


def _is_users(error: Exception) -> bool:
    """Return whether an error is one that the user of a script can mend, and not a fault of the program."""
    if isinstance(error, (ValueError, OSError, FloatingPointError)):
        return True
    torch = sys.modules.get("torch")  # which no error comes from that did not import it
    return torch is not None and isinstance(error, torch.OutOfMemoryError)


def explain(error: Exception) -> str:
    """Return an error as one line, with the flags that its user typed and the command that makes what is missing."""
    message = " ".join(str(error).split())
    message = re.sub(r"`(\w+)`", lambda found: spelled.get(found[1], f"--{found[1]}"), message)
    if isinstance(error, MissingFileError):
        category = error.details.get("category")
        known = {
            "script": METHOD_SCRIPTS.get(str(error.details.get("method")), ""),
            "category_flag": f" --category {category}" if category in CATEGORIES else "",
        }
        details = {name: shlex.quote(str(value)) for name, value in error.details.items()}
        message += f": {_MAKERS[error.kind].format(**known, **details)}"
        for name in _TAKEN_OVER.get(error.kind, ()):
            if typed.get(name):
                message += f" --{name} {shlex.quote(str(typed[name]))}"
    return message
