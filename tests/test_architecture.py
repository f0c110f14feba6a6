"""The arrows that must never exist, and other rules of the house: layers, lengths, words."""

import ast
import functools
import json
import os
import re
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest
import yaml

from ldm.cli.flags import OLDER, ORIGINAL
from ldm.config.methods import METHODS
from ldm.erasure.methods import LOSSES, SOLVERS

ROOT = Path(__file__).resolve().parent.parent
LDM = sorted((ROOT / "ldm").rglob("*.py"))
SCRIPTS = sorted([*(ROOT / "train-scripts").glob("*.py"), *(ROOT / "eval-scripts").glob("*.py")])
FRONT = ROOT / "train-scripts" / "cate-cls-test.py"  # of its twin in eval-scripts, which it runs
# A folder imports only from folders before its own.
LAYERS = ["io", "config", "diffusion", "erasure", "metrics", "toy", "ledger", "experiments", "cli"]
NUMERICS = ["null_space", "closed_form", "embedding_map", "prompt_rows", "negatives", "gate", "gated_edit"]
NUMERICS += ["layer_rows", "output_norms", "shift", "shift_file"]
HEAVY = {"torch", "pandas", "diffusers", "shtab", "tqdm"}  # of tqdm: --quiet is heeded when it is imported
MAX_SCRIPT_LINES, MAX_MODULE_LINES = 110, 420
FLAG = re.compile(r"(?<![\w-])--[a-z]\w*")
SCRIPT_NAME = re.compile(r"[\w-]\.py\b")


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@functools.cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def imported(nodes) -> set[str]:
    """Return the names of all modules, and of what is taken from them, that the nodes import."""
    names = set()
    for node in nodes:
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, "imports are absolute"
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names


def imports(path: Path) -> set[str]:
    return imported(ast.walk(tree_of(path)))


def imports_when_loaded(path: Path) -> set[str]:
    """Return what a module imports when it is imported itself: not in functions, nor for type checkers alone."""
    found, waiting = [], list(tree_of(path).body)
    while waiting:
        node = waiting.pop()
        for_checkers = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        if not for_checkers and not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            found.append(node)
            waiting += ast.iter_child_nodes(node)
    return imported(found)


def strings(path: Path) -> list[str]:
    """Return all string constants of a module: docstrings, messages, and the fixed parts of f-strings."""
    nodes = [node for node in ast.walk(tree_of(path)) if isinstance(node, ast.Constant)]
    return [node.value for node in nodes if isinstance(node.value, str)]


def docstrings(path: Path) -> list[str]:
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    texts = [ast.get_docstring(node) for node in ast.walk(tree_of(path)) if isinstance(node, kinds)]
    return [text for text in texts if text]


def layer(path: Path) -> str:
    """Return the folder of a module; empty for the package's own `__init__`."""
    parts = path.relative_to(ROOT / "ldm").parts
    return parts[0] if len(parts) > 1 else ""


MODULES = [path for path in LDM if layer(path)]


def imported_modules(path: Path) -> list[str]:
    """Return the modules and names of this package that a file imports."""
    return [name for name in imports(path) if name.startswith("ldm.")]


def test_the_package_is_the_nine_folders():
    assert {layer(path) for path in MODULES} == set(LAYERS)
    assert [path.name for path in LDM if not layer(path)] == ["__init__.py"]


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_a_folder_imports_only_from_folders_before_it(path):
    own = LAYERS.index(layer(path))
    for name in imported_modules(path):
        assert LAYERS.index(name.split(".")[1]) <= own, f"{relative(path)} imports {name}"


def test_the_map_of_the_developers_document_has_every_file():
    table = (ROOT / "ldm" / "README.md").read_text().split("## The map")[1].split("##")[0]
    folder, mapped = "", []
    for row in re.findall(r"^\|(.*?)\|(.*?)\|", table, re.MULTILINE):
        folder = row[0].strip(" [").split("]")[0] or folder
        mapped += [f"ldm/{folder}/{name}" for name in re.findall(r"`([\w.]+)`", row[1])]
    modules = [relative(path) for path in LDM if path.name != "__init__.py"]
    assert sorted(mapped) == sorted([*modules, "ldm/experiments/report.html", "ldm/erasure/shift_card.md"])


def test_the_package_itself_imports_nothing_when_it_is_imported():
    assert not [name for name in imports_when_loaded(ROOT / "ldm" / "__init__.py") if name.startswith("ldm")]


@pytest.mark.parametrize("name", NUMERICS)
def test_numerics_import_torch_and_nothing_heavy(name):
    for module in imports(ROOT / "ldm" / "erasure" / f"{name}.py"):
        top = module.split(".")[0]
        allowed = top in sys.stdlib_module_names or top == "torch" or module in ("ldm.io", "ldm.erasure")
        siblings = [f"ldm.erasure.{sibling}" for sibling in NUMERICS]
        assert allowed or module.startswith(("ldm.io.tensors", "ldm.io.checks", *siblings)), module


def test_training_knows_no_loss_by_name():
    path = ROOT / "ldm" / "erasure" / "training.py"
    losses = {kind.__name__ for kind in LOSSES.values()}
    named = {node.id for node in ast.walk(tree_of(path)) if isinstance(node, ast.Name)}
    assert [*LOSSES, *SOLVERS] == list(METHODS)
    assert not (named | {name.split(".")[-1] for name in imports(path)}) & losses
    assert "ldm.erasure.methods" not in imports(path)


@pytest.mark.parametrize(
    ("folder", "never"),
    [("metrics", {"diffusion", "erasure"}), ("diffusion", {"erasure"})],
)
def test_arrows_that_must_never_exist(folder, never):
    for path in MODULES:
        if layer(path) == folder:
            assert not {name.split(".")[1] for name in imported_modules(path)} & never, relative(path)


def all_imports_when_loaded(path: Path, seen: set[Path]) -> set[str]:
    """Return what a file imports when it is loaded, also through the modules of this package; adds these to `seen`."""
    names = imports_when_loaded(path)
    for name in list(names):
        if name.startswith("ldm."):
            module = ROOT / f"{name.replace('.', '/')}.py"
            if module.is_file() and module not in seen:
                seen.add(module)
                names |= all_imports_when_loaded(module, seen)
    return names


@pytest.mark.parametrize("path", [path for path in MODULES if layer(path) == "config"], ids=relative)
def test_config_needs_no_torch(path):
    names = imports(path) | all_imports_when_loaded(path, set())
    assert not {name.split(".")[0] for name in names} & {"torch", "diffusers", "transformers", "pandas"}


def test_arguments_are_parsed_in_cli_alone():
    for path in (*LDM, *SCRIPTS):
        if layer_of_any(path) != "cli":
            assert "argparse" not in imports(path), relative(path)


def layer_of_any(path: Path) -> str:
    return layer(path) if path.is_relative_to(ROOT / "ldm") else "scripts"


@pytest.mark.parametrize("path", [path for path in LDM if layer(path) != "cli"], ids=relative)
def test_flags_and_names_of_scripts_are_known_in_cli_alone(path):
    for text in strings(path):
        found = FLAG.search(text) or SCRIPT_NAME.search(text)
        assert not found, f"{found[0]} in: {text}"


def test_no_device_or_machine_path_is_a_constant():
    for path in (*LDM, *SCRIPTS):
        if layer_of_any(path) != "cli":
            for text in strings(path):
                assert not re.match(r"cuda|cpu$|~|/\w", text), f"{relative(path)}: {text}"


@pytest.mark.parametrize("path", LDM, ids=relative)
def test_a_module_is_one_idea(path):
    assert len(path.read_text().splitlines()) <= MAX_MODULE_LINES


@pytest.mark.parametrize("path", SCRIPTS, ids=relative)
def test_a_script_is_thin_and_imports_no_script(path):
    assert len(path.read_text().splitlines()) <= MAX_SCRIPT_LINES
    assert not imports(path) & {other.stem for other in SCRIPTS}
    assert "runpy" not in imports(path) or path == FRONT


@pytest.mark.parametrize("path", SCRIPTS, ids=relative)
def test_a_script_says_what_it_does_and_stands_in_a_readme(path):
    documents = [ROOT / folder / "README.md" for folder in (".", "train-scripts", "eval-scripts", "models")]
    assert ast.get_docstring(tree_of(path))
    assert any(path.name in document.read_text() for document in documents)


@pytest.mark.parametrize("path", [*LDM, *SCRIPTS], ids=relative)
def test_no_docstring_is_left_to_do(path):
    assert not [text for text in docstrings(path) if re.search(r"\b(TODO|FIXME|XXX)\b", text)]


def test_nothing_that_runs_produce_is_tracked():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split("\n")
    assert not [name for name in listed if name.endswith((".ckpt", ".pyc", ".pickle", ".pt"))]


# One process that has imported nothing heavy forks for each command, and tells what was printed and what was loaded.
FORKER = """
import io, json, os, runpy, sys
from contextlib import redirect_stdout

def attempt(command):
    sys.argv = command
    printed = io.StringIO()
    try:
        with redirect_stdout(printed):
            runpy.run_path(command[0], run_name="__main__")
    except SystemExit:
        pass
    return {"printed": printed.getvalue(), "loaded": sorted(set(sys.modules) & HEAVY)}

import ldm.cli.arguments, ldm.cli.run, ldm.config.models  # what all have in common, once

HEAVY = set(json.loads(sys.argv[1]))
results = []
for command in json.loads(sys.argv[2]):
    reader, writer = os.pipe()
    if not os.fork():
        os.close(reader)
        with open(writer, "w") as opened:
            opened.write(json.dumps(attempt(command)))
        os._exit(0)
    os.close(writer)
    with open(reader) as opened:
        results.append(json.loads(opened.read() or "null"))
    os.wait()
print(json.dumps(results))
"""
LEDGER = "train-scripts/ledger.py"
LEDGER_COMMANDS = ["init", "erase", "restore", "status", "history", "verify", "export"]
HELP = [[relative(path), "--help"] for path in SCRIPTS] + [[LEDGER, command, "--help"] for command in LEDGER_COMMANDS]
STATUS = [LEDGER, "status", "--ledger_dir", "tests/data/v0.1/ledger"]


@pytest.fixture(scope="module")
def light_runs() -> dict[str, dict]:
    """Return, for each command that should answer at once, what it printed and which heavy modules it loaded."""
    commands = [*HELP, STATUS]
    # Wide enough that no name is broken at a hyphen.
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "400"}
    arguments = [sys.executable, "-c", FORKER, json.dumps(sorted(HEAVY)), json.dumps(commands)]
    done = subprocess.run(arguments, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    results = json.loads(done.stdout)
    assert all(results), done.stderr
    return {" ".join(command): result for command, result in zip(commands, results, strict=True)}


@pytest.mark.parametrize("command", [" ".join(command) for command in HELP])
def test_help_loads_nothing_heavy(light_runs, command):
    assert not light_runs[command]["loaded"]
    assert light_runs[command]["printed"].startswith("usage: ")


def test_a_ledgers_status_loads_no_model(light_runs):
    run = light_runs[" ".join(STATUS)]
    assert "| erased |" in run["printed"] and not set(run["loaded"]) - {"pandas"}


# Words of version 0.1 that have a standard one today, in the sense in which they were used, and what to write instead.
OLD_WORDS = {
    r"embedded models?": "bundled model",
    r"blank prompts?|the blank\b|blank one": "empty prompt",
    r"recipes?": "metadata",
    r"pictures?|pictured": "image",
    r"painters?|paints?|painted": "renderer, render",
    r"leaks?|leaked|leaking": "leakage",
    r"g(?:ive|ives|iving|iven|ave) (?:\w+ ){0,2}back": "restore",
    r"goes out|went out": "erase",
    r"bare names?": "concept name",
    r"goes on where it was|goes on with the same": "resumes",
    r"switch\w* (?:a |the |it )?(?:concepts? |shifts? )?(?:on|off)(?! for the whole)": "activate, erase, restore",
    r"draw(?:s|n|ing)? (?:the |its |new |more )?images|images (?:is|are|were) drawn|drawn images": "generate",
    r"moves (?:own|its own|other|others|protected|blank)": "changes the output of",
    r"world(?!.size)": "synthetic dataset",
    r"(?:no|more|much|leaves?|makes?|made|gives?|gave) room|room (?:that|of|at)": "free dimensions, nullity",
    r"(?<!at )(?:most|least) (?:iterations|steps|basis vectors|directions|characters)": "max, min",
    r"(?:its|own|process's|each) share|shares? of (?:the|its) (?:work|captions)": "shard; mixture weights",
    r"foresee|foreseen|foresees": "estimate",
    r"desks?": "demo",
    r"(?:contact |image )?sheets?": "image grid",
    r"what layers see|what it puts out|puts? out|putting out": "output, context",
    r"drawn from": "chosen from, sampled from",
}
# No prose: keys and names, and the captions that the bundled models were trained on.
NO_PROSE = re.compile(r"\S*|a picture( of \{\w*\}( by \{\w*\})?)?")
# Whose texts are prompts as a person would write them.
CAPTION_FILES = (
    "ldm/toy/natural.py",
    "ldm/erasure/key_values.py",
    "configs/templates.yaml",
    "configs/prompt_kinds.yaml",
    "configs/meanings.yaml",
)
COMMENT = re.compile(r"(?:^|\s)#(.*)", re.MULTILINE)
CODE_SPAN = re.compile(r"`[^`\n]*`|\]\([^)]*\)|!\[[^\]]*\]")
FENCE = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)
DOCUMENTS = sorted(
    path
    for path in ROOT.rglob("*.md")
    if not set(path.relative_to(ROOT).parts) & {".venv", ".pytest_cache", "node_modules", "demo", "evaluation_folder"}
)


def old_words(text: str) -> list[str]:
    """Return the lines of prose that hold an old word, code left out, each with the word and today's."""
    prose = CODE_SPAN.sub(" ", text)
    found = []
    for line in prose.splitlines():
        for pattern, todays in OLD_WORDS.items():
            word = re.search(rf"\b(?:{pattern})\b", line, re.IGNORECASE)
            if word:
                found.append(f"'{word[0]}' (write: {todays}) in: {line.strip()}")
    return found


def test_the_words_are_found_where_they_are():
    assert old_words("no picture leaks") and old_words("give it back") and old_words("Its share of the work")
    assert not old_words("leakage of a painting, given by an image `picture`") and not old_words(
        "get it back from a copy"
    )
    assert old_words("What it puts out.\nSeeds are drawn from it")[1:]
    assert (
        not NO_PROSE.fullmatch(" pictures") and NO_PROSE.fullmatch("pictures") and NO_PROSE.fullmatch("a picture of {}")
    )
    assert len(DOCUMENTS) > 6


def without_fences(text: str) -> str:
    """Return a document without its fenced blocks, whose lines stay as empty ones."""
    return FENCE.sub(lambda block: "\n" * block[0].count("\n"), text)


@pytest.mark.parametrize("path", DOCUMENTS, ids=relative)
def test_documents_are_in_todays_words(path):
    assert not old_words(without_fences(path.read_text()))


def f_strings(path: Path) -> list[str]:
    """Return the f-strings of a module, each whole, with `x` for what is put in."""
    nodes = [node for node in ast.walk(tree_of(path)) if isinstance(node, ast.JoinedStr)]
    parts = [[part.value if isinstance(part, ast.Constant) else "x" for part in node.values] for node in nodes]
    return ["".join(map(str, texts)) for texts in parts]


def comments(path: Path) -> list[str]:
    """Return the comments of a module."""
    with tokenize.open(path) as opened:
        return [token.string for token in tokenize.generate_tokens(opened.readline) if token.type == tokenize.COMMENT]


def yaml_texts(value: object) -> list[str]:
    """Return all keys and texts of what a YAML file holds."""
    if isinstance(value, dict):
        return [text for pair in value.items() for item in pair for text in yaml_texts(item)]
    if isinstance(value, list):
        return [text for item in value for text in yaml_texts(item)]
    return [value] if isinstance(value, str) else []


@pytest.mark.parametrize("path", [*LDM, *SCRIPTS], ids=relative)
def test_texts_and_comments_are_in_todays_words(path):
    own = docstrings(path) if relative(path) in CAPTION_FILES else [*strings(path), *f_strings(path)]
    texts = [*own, *comments(path)]
    assert not [line for text in texts if not NO_PROSE.fullmatch(text) for line in old_words(text)]


@pytest.mark.parametrize(
    "path", sorted([*ROOT.glob("configs/**/*.yaml"), *ROOT.glob("models/mini-*/*.yaml")]), ids=relative
)
def test_configs_are_in_todays_words(path):
    text = path.read_text()
    own = [] if relative(path) in CAPTION_FILES else yaml_texts(yaml.safe_load(text))
    texts = [*own, *COMMENT.findall(text)]
    assert not [line for text in texts if not NO_PROSE.fullmatch(text) for line in old_words(text)]


@pytest.mark.parametrize("command", [" ".join(command) for command in HELP])
def test_help_is_in_todays_words(light_runs, command):
    assert not old_words(light_runs[command]["printed"])


# Older spellings of one script's flag that are another script's own flag today.
TODAYS_TOO = {"--model_name", "--share", "--held_out", "--scale"}


def old_flags(text: str) -> list[str]:
    """Return the lines that have an older flag without today's name, outside of sections about older ones."""
    todays: dict[str, set[str]] = {}
    for spellings in (ORIGINAL, OLDER):
        for name, flags in spellings.items():
            for flag in flags:
                todays.setdefault(flag, set()).add(name)
    found, exempt = [], False
    for line in text.splitlines():
        if re.match(r"#+ ", line):
            exempt = bool(re.search(r"original|version 0\.1|older", line, re.IGNORECASE))
        for flag in [] if exempt else FLAG.findall(line):
            known = todays.get(flag, set())
            if known and flag not in TODAYS_TOO and not any(re.search(rf"\b{name}\b", line) for name in known):
                found.append(f"{flag} (today --{' or --'.join(sorted(known))}) in: {line.strip()}")
    return found


@pytest.mark.parametrize("path", DOCUMENTS, ids=relative)
def test_documents_use_todays_flags(path):
    assert not old_flags(path.read_text())


@pytest.mark.parametrize("path", [*SCRIPTS, *LDM], ids=relative)
def test_docstrings_use_todays_flags(path):
    assert not [line for text in docstrings(path) for line in old_flags(text)]
