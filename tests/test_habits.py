"""What every script understands alike: --version, --quiet, --json, --print_completion and --device."""

import argparse
import ast
import json
import os
import subprocess
import sys
import tomllib

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT, is_error
from test_flags import parser_of

from ldm.cli import habits, output
from ldm.cli.devices import require_cpu
from ldm.metrics.tables import to_json

SCRIPTS = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("*-scripts/*.py"))
LEDGER = "train-scripts/ledger.py"
COMMANDS = [f"{LEDGER} {name}" for name in next(iter(parser_of(LEDGER)._subparsers._group_actions)).choices]
# What shows no table: it writes files, serves a page, or tells in sentences.
WITHOUT_TABLES = {
    *(f"train-scripts/{name}.py" for name in ("SRSME_Solution", "artist-cls-train", "convert-lpips", "move_image")),
    *(f"eval-scripts/{name}.py" for name in ("demo", "generate-data", "generate-images", "generate-images-merge")),
    *(f"eval-scripts/{name}.py" for name in ("make-prompts", "report")),
    "train-scripts/train-mini-flux.py",
    "train-scripts/train-mini-sd.py",
    *(f"{LEDGER} {name}" for name in ("init", "add", "history", "repair", "migrate")),
}
# What computes nothing by a model or a network.
WITHOUT_DEVICE = {
    *(f"train-scripts/{name}.py" for name in ("convert-lpips", "join-shifts", "move_image")),
    "eval-scripts/make-prompts.py",
    *(f"{LEDGER} {name}" for name in ("restore", "status", "history", "repair", "migrate")),
}
NAMES = [name for name in SCRIPTS if name != LEDGER] + COMMANDS
OLD_LEDGER = ROOT / "tests" / "data" / "v0.1" / "ledger"


def actions_of(name: str) -> dict[str, argparse.Action]:
    return {action.dest: action for action in parser_of(name)._actions}


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_script_says_its_version(script, name):
    said = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert script(name, "--version") == (0, f"srs-me {said}\n", "")


def test_the_version_is_the_packages_where_there_is_no_clone(monkeypatch, tmp_path):
    monkeypatch.setattr(habits, "REPO_ROOT", tmp_path)
    monkeypatch.setattr(habits, "version", lambda name: f"that of {name}")
    assert habits.package_version() == "that of srs-me"


@pytest.mark.parametrize("name", NAMES)
def test_every_script_and_command_can_be_quiet(name):
    assert actions_of(name)["quiet"].help == actions_of(SCRIPTS[0])["quiet"].help


@pytest.mark.parametrize("name", NAMES)
def test_every_script_that_shows_a_table_has_json(name):
    assert ("json" in actions_of(name)) == (name not in WITHOUT_TABLES)


@pytest.mark.parametrize("path", [ROOT / name for name in SCRIPTS], ids=SCRIPTS)
def test_no_script_prints_a_table_itself(path):
    assert "print(to_markdown" not in path.read_text() and "{to_markdown" not in path.read_text()


@pytest.mark.parametrize("name", NAMES)
def test_every_script_that_computes_has_one_device(name):
    actions = actions_of(name)
    assert ("device" in actions) == (name not in WITHOUT_DEVICE)
    if "device" in actions:
        assert actions["device"].help == actions_of("eval-scripts/compare.py")["device"].help
        assert actions["device"].option_strings == ["--device"]


# Tables.


def test_json_has_numbers_unrounded_and_null_for_what_is_none():
    numbers = [1 / 3, float("nan"), float("inf")]
    table = pd.DataFrame({"a": ["x", "é", None], "b": numbers, "c": np.arange(3), "d": [True, False, True]})
    table["e"] = np.float32([0.1, 1, 2])
    rows = json.loads(to_json({"": table}))
    assert [row["a"] for row in rows] == ["x", "é", None] and [row["b"] for row in rows] == [1 / 3, None, None]
    assert [row["c"] for row in rows] == [0, 1, 2] and rows[1]["d"] is False
    assert rows[0]["e"] == float(np.float32(0.1))
    assert json.loads(to_json({"one": table[:1], "two": table[:0]})) == {"one": rows[:1], "two": []}
    assert json.loads(to_json({})) == []


TABLE = pd.DataFrame({"a": [0.123456789]})


def shown(capsys, *switches, error: Exception | None = None) -> tuple[str, str]:
    """Return stdout and stderr of a script that prints lines and two tables under these switches."""
    try:
        with output.printing():
            for switch in switches:
                switch()
            print("a line")
            output.show_table(TABLE, "one", "its title")
            output.show_table(TABLE[:0], "none")
            print("a warning", file=sys.stderr)
            if error:
                raise error
    except ValueError:
        assert error
    return tuple(capsys.readouterr())


def test_lines_and_tables_go_where_the_switches_say(capsys):
    markdown = "its title\n\n| a |\n| --- |\n| 0.1235 |\n"
    expected = {"one": [{"a": 0.123456789}], "none": []}
    assert shown(capsys) == ("a line\n" + markdown, "a warning\n")
    assert shown(capsys, output.be_quiet) == (markdown, "a warning\n")
    out, err = shown(capsys, output.print_json)
    assert json.loads(out) == expected and err == "a line\na warning\n"
    for switches in ((output.be_quiet, output.print_json), (output.print_json, output.be_quiet)):
        out, err = shown(capsys, *switches)
        assert json.loads(out) == expected and err == "a warning\n"
    assert json.loads(shown(capsys, output.print_json, error=ValueError())[0]) == expected
    assert shown(capsys) == ("a line\n" + markdown, "a warning\n")  # the switches are as before


def test_the_switch_of_progress_bars_lasts_as_long_as_the_script(monkeypatch):
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    with output.printing():
        output.be_quiet()
        output.be_quiet()
        assert os.environ["TQDM_DISABLE"] == "1"
    assert "TQDM_DISABLE" not in os.environ
    monkeypatch.setenv("TQDM_DISABLE", "0")  # a user's own
    with output.printing():
        output.be_quiet()
    assert os.environ["TQDM_DISABLE"] == "0"


def test_a_table_in_json_has_the_rows_of_its_markdown(script):
    code, out, _ = script(LEDGER, "status", "--ledger_dir", OLD_LEDGER)
    lines = [line.strip("| ").split(" | ") for line in out.splitlines()]
    assert code == 0
    code, out, err = script(LEDGER, "status", "--ledger_dir", OLD_LEDGER, "--json")
    rows = json.loads(out)
    assert code == 0 and not err and list(rows[0]) == lines[0]
    assert [row["concept"] for row in rows] == [line[1] for line in lines[2:]]


def test_an_answer_in_sentences_is_printed_quietly_too(script):
    history = script(LEDGER, "history", "--ledger_dir", OLD_LEDGER)
    assert history == script(LEDGER, "history", "--ledger_dir", OLD_LEDGER, "--quiet")
    assert history == script(LEDGER, "--quiet", "history", "--ledger_dir", OLD_LEDGER) and history[1]


def test_json_and_quiet_on_the_whole_path(script, tiny_path, tmp_path):
    flags = ["--model", tiny_path, "--artifacts_dir", tmp_path, "--device", "cpu"]
    erased = [*flags, "--erased_index", "1"]
    code, out, _ = script("train-scripts/SRSME_Solution.py", *erased, "--em_indexes", "1,2", "--quiet")
    assert code == 0 and not out
    code, out, _ = script("train-scripts/SRS_ME.py", *erased, "--no-gate", "--least_effect", "-9", "--json")
    (row,) = json.loads(out)
    assert code == 0 and row["iterations"] == 0
    code, out, err = script("train-scripts/SRS_ME.py", *erased, "--no-gate", "--least_effect", "-9", "--json")
    assert code == 0 and json.loads(out) == [] and "is there already" in err
    merge = ["train-scripts/Merge_model.py", *flags, "--shifts", "1", "--format", "unet", "--save_path", tmp_path]
    code, out, err = script(*merge, "--json")
    tables = json.loads(out)
    assert list(tables) == ["leakage", "truncated"] and tables["leakage"] and tables["truncated"] == []
    assert code == 0 and "-> " in err
    code, out, _ = script(*merge, "--quiet")
    assert code == 0 and len(out.splitlines()) == 2 + len(tables["leakage"])
    assert all(line.startswith("|") for line in out.splitlines())


def test_a_quiet_script_has_no_progress_bars_whoever_makes_them():
    lines = ["from ldm.cli import output", "with output.printing():", "    output.be_quiet()"]
    lines += ["    import tqdm, tqdm.auto, huggingface_hub.utils as hub"]
    bars = [f"    list({bar}(range(3)))" for bar in ("tqdm.tqdm", "tqdm.auto.tqdm", "hub.tqdm")]
    settings = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_DISABLE_PROGRESS_BARS": "0"}
    for switched, is_silent in ((lines, True), ([*lines[:2], *lines[3:]], False)):
        command = [sys.executable, "-c", "\n".join([*switched, *bars])]
        done = subprocess.run(command, env=settings, capture_output=True, text=True, check=True)
        assert (not done.stderr) == is_silent and done.stderr.count("100%") == (0 if is_silent else 3)


@pytest.mark.parametrize("path", sorted((ROOT / "ldm").rglob("*.py")), ids=lambda path: path.stem)
def test_no_bar_overrules_quiet(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "tqdm":
            assert "disable" not in [keyword.arg for keyword in node.keywords]


def test_an_error_is_told_in_quiet_and_json_is_then_empty(script, tiny_path):
    result = script("train-scripts/Merge_model.py", "--shifts", "1", "--model", tiny_path, "--quiet", "--json")
    is_error(result, "no shift")
    assert not result[1]


# Completion.


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_script_prints_completion_that_bash_parses(script, name):
    code, out, _ = script(name, "--print_completion", "bash")
    assert code == 0 and subprocess.run(["bash", "-n"], input=out, text=True, check=True).returncode == 0
    for shell in ("zsh", "tcsh"):
        code, out, _ = script(name, "--print_completion", shell)
        assert code == 0 and "quiet" in out and name.rpartition("/")[2] in out


def completions(source: str, *words: str) -> list[str]:
    """Return what bash offers for the last of the words after it has read `source`."""
    program = source + '\nCOMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _srsme_after_python; echo "${COMPREPLY[*]}"'
    done = subprocess.run(["bash", "-c", program, "-", *words], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.split()


def test_bash_completes_flags_commands_choices_and_files_after_python(script):
    source = (
        script(LEDGER, "--print_completion", "bash")[1]
        + script("eval-scripts/compare.py", "--print_completion", "bash")[1]
    )
    python = ("python", LEDGER)
    assert completions(source, *python, "") == [name.partition(" ")[2] for name in COMMANDS]
    assert completions(source, *python, "erase", "--met") == ["--method"]
    assert "ESD" in completions(source, *python, "erase", "--method", "")
    assert completions(source, *python, "init", "--model", "mod") == ["models"]
    assert "--ledger_dir" not in completions(source, "python", "eval-scripts/compare.py", "--")
    assert completions(source, "python", "eval-scripts/compare.py", "--original_dir", "eval-s") == ["eval-scripts"]
    assert completions(source, "python", "tests/conftest.py", "") == []  # which leaves files to bash


def test_what_is_hidden_from_help_is_not_completed(script):
    out = script("train-scripts/SRSME_Solution.py", "--print_completion", "bash")[1]
    assert "--em_indexes" in out and "--erase_cat" in out
    for hidden in ("--tolerance", "--shifts_path", "--basis "):
        assert hidden not in out


def test_a_detector_that_runs_on_the_cpu_alone_says_so(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    require_cpu(None, "it")
    require_cpu("cpu", "it")
    with pytest.raises(ValueError, match="`device` cuda:0: it runs on the CPU alone: give cpu"):
        require_cpu("cuda:0", "it")
