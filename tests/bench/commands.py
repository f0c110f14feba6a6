"""A whole command as a user types it, from the shell's prompt to the next: one own concept erased from mini-sd.

Against it uce.py beside this file, which does the same by UCE's closed form, written from its paper. Both run in turn,
each time in a process of its own, so that a slower minute of the machine meets both: the medians of seconds on the
clock, and of seconds of the processor, which other work on the machine changes less. Then what the seconds of ours go
to, and how long --help takes. A timing is never asserted.
"""

from __future__ import annotations

import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from ldm.cli import arguments
from ldm.cli.run import run
from ldm.io.paths import REPO_ROOT

MODEL = REPO_ROOT / "models" / "mini-sd"
OURS = ("train-scripts/SRS_ME.py", "--concepts", "a church", "--protect", "a dog", "oil painting")
UCE = ("tests/bench/uce.py", "--edit_concepts", "a church", "--preserve_concepts", "a dog; oil painting")
# What ours does before its own work, in a process of its own: seconds of each part.
PARTS = """
import sys, time
from ldm.cli.run import run

def main():
    marks = [time.perf_counter()]
    import diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion
    marks.append(time.perf_counter())
    from ldm.cli import erasure
    from ldm.diffusion.load import load_model
    from ldm.erasure import erase
    marks.append(time.perf_counter())
    load_model(sys.argv[1])
    marks.append(time.perf_counter())
    print(*(later - earlier for earlier, later in zip(marks, marks[1:])))

run(main)
"""


@dataclass(frozen=True)
class Timing:
    """What a process took: seconds on the clock, and of the processor."""

    wall: float
    cpu: float


def run_process(*words: str) -> tuple[Timing, str]:
    """Run Python with these arguments to its end, and return what it took and what it printed."""
    environment = {**os.environ, "PYTHONPATH": str(REPO_ROOT), "HF_HUB_OFFLINE": "1"}
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run([sys.executable, *words], cwd=REPO_ROOT, env=environment, capture_output=True, text=True)
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)}: {done.stderr[-2000:]}")
    return Timing(wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime), done.stdout


def run_ours() -> Timing:
    """Erase by this repository's script, into a new folder."""
    with tempfile.TemporaryDirectory() as folder:
        return run_process(*OURS, "--model", str(MODEL), "--artifacts_dir", folder)[0]


def run_uce() -> Timing:
    """Erase by UCE's closed form, into a new folder."""
    with tempfile.TemporaryDirectory() as folder:
        return run_process(*UCE, "--model_path", str(MODEL), "--save", str(Path(folder) / "uce.safetensors"))[0]


def median(timings: list[Timing]) -> Timing:
    """Return the median of each column."""
    return Timing(statistics.median(t.wall for t in timings), statistics.median(t.cpu for t in timings))


def main() -> None:
    parser = arguments.make_parser(__doc__)
    parser.option("repeat", type=arguments.positive_int, default=5, help="how often each command is run")
    repeat = parser.parse_args().repeat
    run_ours(), run_uce()  # to warm the file cache
    ours: list[Timing] = []
    uce: list[Timing] = []
    helps: list[Timing] = []
    parts: list[list[float]] = []
    for _ in range(repeat):
        ours.append(run_ours())
        uce.append(run_uce())
        helps.append(run_process(OURS[0], "--help")[0])
        parts.append([float(text) for text in run_process("-c", PARTS, str(MODEL))[1].split()])
    own, theirs = median(ours), median(uce)
    print(
        f"one command: {own.wall:.2f} s, {own.wall / theirs.wall:.2f} times UCE's ({theirs.wall:.2f} s); of the "
        f"processor {own.cpu:.2f} s, {own.cpu / theirs.cpu:.2f} times UCE's ({theirs.cpu:.2f} s); load of the machine "
        f"{os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"
    )
    libraries, imports, load = (statistics.median(times) for times in zip(*parts, strict=True))
    rest = own.wall - libraries - imports - load
    print(
        f"  of ours: torch and diffusers imported {libraries:.2f} s, this package {imports:.2f} s, model loaded "
        f"{load:.2f} s, its work with Python's start and end {rest:.2f} s"
    )
    print(f"--help: {median(helps).wall:.2f} s, of the processor {median(helps).cpu:.2f} s")


if __name__ == "__main__":
    run(main)
