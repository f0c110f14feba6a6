"""The arrows that must never exist, and other rules of the house."""

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LDM = sorted((ROOT / "ldm").rglob("*.py"))
SCRIPTS = sorted([*(ROOT / "train-scripts").glob("*.py"), *(ROOT / "eval-scripts").glob("*.py")])
# Bottom to top: a module imports only from lines above its own.
ORDER = ["share", "concepts", "images", "checkpoint", "model", "attention", "null_space", "shift", "export", "sampling", "latents",
         "losses", "plan", "store", "training", "erasure", "capacity", "metrics", "mini", "plots", "ledger", "desk", "experiment", "scenes", "report", "ablation", "cli", "cli_experiment"]


def imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names


def room(name: str) -> str:
    return name.split(".")[1]


@pytest.mark.parametrize("path", LDM, ids=lambda p: p.stem)
def test_modules_import_only_from_below(path):
    own = path.relative_to(ROOT / "ldm").with_suffix("").parts[0]
    for name in imports(path):
        if name.startswith("ldm."):
            assert room(name) == own or ORDER.index(room(name)) < ORDER.index(own), f"{path.name} imports {name}"


@pytest.mark.parametrize("who, never", [
    ("model", {"null_space", "shift"}), ("sampling", {"null_space", "shift"}), ("shift", {"losses", "training", "sampling", "metrics"}),
    ("training", {"losses"}), ("metrics", {"model", "shift"})])
def test_arrows_that_must_never_exist(who, never):
    for path in LDM:
        if path.relative_to(ROOT / "ldm").with_suffix("").parts[0] == who:
            assert not {room(name) for name in imports(path) if name.startswith("ldm.")} & never


def test_arguments_are_parsed_in_cli_and_scripts_alone():
    assert [path.name for path in LDM if "argparse" in imports(path)] == ["cli.py"]


def test_no_device_or_machine_path_is_a_constant():
    for path in (*LDM, *SCRIPTS):
        if path.name != "cli.py":
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    assert not re.match(r"cuda|cpu$|~|/\w", node.value), f"{path.name}: {node.value}"


def test_scripts_are_thin_and_import_no_script():
    for path in SCRIPTS:
        assert len(path.read_text().splitlines()) <= 110, path.name
        assert not imports(path) & {other.stem for other in SCRIPTS}, path.name
        assert "argparse" not in imports(path), f"{path.name}: ldm.cli has the parser"


def test_every_script_says_what_it_does_and_stands_in_the_readme():
    readme = (ROOT / "README.md").read_text()
    for path in SCRIPTS:
        assert ast.get_docstring(ast.parse(path.read_text())), path.name
        assert path.name in readme, path.name


def test_nothing_that_runs_produce_is_tracked():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split("\n")
    assert not [name for name in listed if name.endswith((".ckpt", ".pyc", ".pickle", ".pt"))]
