"""How a script ends: by a closed pipe, a full disk, Ctrl-C, or a notice; always without a traceback."""

import gc
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
from conftest import ROOT, is_error

from ldm.cli.run import _USERS_ERRORS_OF, run
from ldm.config.concept_lists import read_concepts
from ldm.io.errors import Notice, notify

MAKE = [sys.executable, str(ROOT / "eval-scripts" / "make-prompts.py")]


def test_output_that_nobody_reads_ends_a_script_quietly(tmp_path):
    read_end, write_end = os.pipe()
    os.close(read_end)
    command = [*MAKE, "--save_path", str(tmp_path / "list.csv")]
    result = subprocess.run(command, stdout=write_end, stderr=subprocess.PIPE, text=True)
    os.close(write_end)
    assert result.returncode == 128 + signal.SIGPIPE and not result.stderr
    assert (tmp_path / "list.csv").is_file()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_output_that_has_no_room_is_one_line(tmp_path, unbuffered):
    environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    with open("/dev/full", "w") as full:
        command = [*MAKE, "--save_path", str(tmp_path / "list.csv")]
        result = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, env=environment)
    is_error((result.returncode, "", result.stderr), "No space left")


def test_ctrl_c_while_a_script_imports_is_one_line():
    command = [sys.executable, "-c", "import ldm.cli; raise KeyboardInterrupt"]
    result = subprocess.run(command, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    assert result.returncode == -signal.SIGINT and result.stderr == "stopped before anything was done\n"


def test_ctrl_c_of_which_a_library_makes_another_error_is_one_line(capsys):
    def main() -> None:
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)
        except KeyboardInterrupt:
            raise RuntimeError("failed to import") from None

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # which is none in the background of a shell
    with pytest.raises(SystemExit) as ended:
        run(main)
    signal.signal(signal.SIGINT, before)
    assert ended.value.code == 130 and capsys.readouterr().err.startswith("stopped; nothing is half written")


def test_garbage_is_looked_for_late_at_first_and_then_as_usual():
    usual, callbacks, seen = gc.get_threshold(), list(gc.callbacks), []

    def main() -> None:
        seen.append(gc.get_threshold()[0])
        gc.collect()
        seen.append(gc.get_threshold()[0])

    run(main)
    assert seen[0] > 100 * usual[0] and seen[1] == usual[0]
    assert gc.get_threshold() == usual and gc.callbacks == callbacks


@pytest.mark.kill
@pytest.mark.parametrize("moment", [0, 0.1, 0.2, 0.4, 0.6, 1, 1.5, 2.2, 3])
def test_ctrl_c_at_any_moment_leaves_no_traceback(moment, tiny_path, tmp_path):
    script = str(ROOT / "train-scripts" / "SRSME_Solution.py")
    code = f"import runpy, ldm.cli; print(flush=True); runpy.run_path({script!r}, run_name='__main__')"
    flags = ["--model", str(tiny_path), "--erased_index", "0-8", "--artifacts_dir", str(tmp_path)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": ROOT}
    process = subprocess.Popen([sys.executable, "-c", code, *flags], **pipes)
    process.stdout.readline()  # Python has started
    try:
        _, err = process.communicate(timeout=moment)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert "Traceback" not in err and process.returncode in (0, 130, -signal.SIGINT)


def raise_(error: BaseException) -> None:
    raise error


def users_errors() -> list[Exception]:
    import omegaconf.errors
    import safetensors
    import torch
    import yaml  # imported, so that run knows them

    assert {"safetensors", "torch", "yaml"} <= set(_USERS_ERRORS_OF)
    return [
        ValueError("x"),
        OSError(28, "No space left on device"),
        safetensors.SafetensorError("No space left on device"),
        ImportError("no module torchsde"),
        RecursionError("x"),
        MemoryError(),
        torch.OutOfMemoryError("x"),
        omegaconf.errors.ConfigKeyError("x"),
        yaml.YAMLError("x"),
    ]


@pytest.mark.parametrize("error", users_errors(), ids=lambda error: type(error).__name__)
def test_what_reading_and_writing_may_raise_is_one_line(error, capsys):
    with pytest.raises(SystemExit) as ended:
        run(lambda: raise_(error))
    is_error((ended.value.code, *capsys.readouterr()), str(error) or "out of memory")


def test_a_fault_of_the_program_is_no_users_error():
    with pytest.raises(KeyError):
        run(lambda: raise_(KeyError("x")))


def test_a_notice_is_one_line_with_the_flags_that_were_typed(capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("default")  # as in a process of its own
        run(lambda: notify("choose another `save_path`"))
    out, err = capsys.readouterr()
    assert not out and err.endswith(": notice: choose another --save_path\n") and err.count("\n") == 1


@torch.no_grad()
def test_in_python_a_notice_points_to_the_line_of_its_user():
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always", Notice)
        read_concepts(["Alan Smithee", "Alan Smithe"])
        torch.no_grad()(read_concepts)(["Alan Smithee", "Alan Smithe"])  # through a frame of torch
        notify("said by a user")
    assert [notice.filename for notice in found] == [__file__] * 3
    assert len({notice.lineno for notice in found}) == 3
