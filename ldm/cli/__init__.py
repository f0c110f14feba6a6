"""The command line: the only place that knows argparse, flags and the names of scripts."""

import sys
from types import TracebackType

_show_uncaught = sys.excepthook


def _show(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Say in one line that Ctrl-C stopped a script while it was still importing, before `ldm.cli.run` sees to it."""
    if issubclass(kind, KeyboardInterrupt):
        print("stopped before anything was done", file=sys.stderr)
    else:
        _show_uncaught(kind, error, trace)


sys.excepthook = _show
