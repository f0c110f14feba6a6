"""Files that were changed at random: each is read as what it says, or refused in one line, and nothing else changes.

Headers of shifts and bases, ledgers' histories, metadata of folders, models' configs, prompt lists, YAML files, images,
checkpoints. FUZZ=5 tries five times as many.
"""

import contextlib
import copy
import io
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from conftest import CPU, compvis_config, styles
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from ldm.cli.reproduce import reproduction_commands
from ldm.cli.run import run
from ldm.config import concepts as concept_lists
from ldm.config.concepts import get_concept
from ldm.config.methods import ExportConfig, SamplingConfig
from ldm.config.models import bundled_config, read_model_config, read_yaml
from ldm.config.scenes import load_scene
from ldm.diffusion.compvis import convert_to_compvis
from ldm.diffusion.load import load_model
from ldm.diffusion.sampling import generate
from ldm.erasure.erase import erase
from ldm.erasure.export import export, truncate_shifts
from ldm.erasure.merge import load_shifts, merge
from ldm.erasure.null_space import BASIS_FILE_TYPE, NullSpaceBasis
from ldm.erasure.protection import Protection
from ldm.erasure.shift import SHIFT_FILE_TYPE
from ldm.io.images import is_image, list_images, load_batch
from ldm.io.paths import ArtifactPaths
from ldm.io.prompts import PromptCase, merge_prompt_csv, read_prompt_csv, write_prompt_csv
from ldm.io.tensors import load_tensors, save_tensors
from ldm.ledger.ledger import HISTORY_FILE, Ledger, make_header, status_table
from ldm.ledger.operations import create_shifts

pytestmark = pytest.mark.slow
TIMES = int(os.environ.get("FUZZ", "1"))
CONFIG = bundled_config("mini-sd")
METHOD = CONFIG.methods["SRS-ME"].with_changes(mode="closed_form", init="closed_form")


def examples(number: int):
    """Try a test with that many examples, the same in every run."""
    unfit = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
    return settings(
        max_examples=number * TIMES, deadline=None, derandomize=True, database=None, suppress_health_check=unfit
    )


def outcome(read) -> int:
    """Run `read` as a script's main, and return its exit code, 0 or 2; of 2 there is one line on stderr."""
    err = io.StringIO()
    try:
        with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()):
            run(read)
        return 0
    except SystemExit as ended:
        code = ended.code
    lines = [line for line in err.getvalue().replace("\r", "\n").splitlines() if "error:" in line]
    assert code == 2 and len(lines) == 1 and len(lines[0]) < 3000, err.getvalue()
    return 2


class Deep:
    """What JSON cannot hold: so many lists within each other that no reader follows."""


UNEXPECTED = [
    None,
    True,
    -1,
    0,
    3,
    0.5,
    1e308,
    float("inf"),
    float("nan"),
    2**70,
    "",
    "x",
    "../../x",
    "a\u2028b",
    "\ud800",
]
UNEXPECTED += ["0", "1e400", [], {}, [None], {"x": 1}, ["x", "x"], Deep()]


def places(document, path=()):
    """Return the paths of all values in a JSON document."""
    found = [path]
    if isinstance(document, dict):
        for key, value in document.items():
            found += places(value, (*path, key))
    if isinstance(document, list):
        for index, value in enumerate(document):
            found += places(value, (*path, index))
    return found


@st.composite
def changed_json(draw, document) -> str:
    """Return a document in which some values are others, missing or doubled, as JSON."""
    changed = {"document": copy.deepcopy(document)}
    for _ in range(draw(st.integers(1, 2))):
        path = ("document", *draw(st.sampled_from(places(changed["document"]))))
        *parents, last = path
        parent = changed
        for key in parents:
            parent = parent[key]
        how = draw(st.sampled_from(["another", "another", "another", "missing", "more"]))
        if how == "missing" and len(path) > 1:
            del parent[last]
        elif how == "more" and isinstance(parent[last], list):
            parent[last] = parent[last] * draw(st.sampled_from([2, 300]))
        else:
            parent[last] = copy.deepcopy(draw(st.sampled_from(UNEXPECTED)))
    text = json.dumps(changed["document"], default=lambda _: "?deep?")
    return text.replace('"?deep?"', "[" * 20_000 + "]" * 20_000)


@st.composite
def changed_bytes(draw, content: bytes) -> bytes:
    """Return bytes of which some are others, missing, or more."""
    changed = bytearray(content)
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.integers(0, max(0, len(changed) - 1)))
        how = draw(st.sampled_from(["flip", "cut", "insert", "remove", "zero"]))
        if how == "flip" and changed:
            changed[place] ^= 1 << draw(st.integers(0, 7))
        elif how == "cut":
            del changed[place:]
        elif how == "insert":
            changed[place:place] = draw(
                st.sampled_from([b"\0", b"\n", b"\r", b'"', b",", b"\xff\xfe", b"{[", b"9" * 30])
            )
        elif how == "remove":
            del changed[place : place + draw(st.integers(1, 30))]
        else:
            changed[place : place + 8] = bytes(len(changed[place : place + 8]))
    return bytes(changed)


def files(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def model(tiny_path):
    return load_model(tiny_path, CPU)


@pytest.fixture(scope="module")
def made(model, tmp_path_factory) -> ArtifactPaths:
    """Make a basis and a shift, and return where they are."""
    artifacts = ArtifactPaths(tmp_path_factory.mktemp("made"), "SRS-ME", "tiny", "style", 1, 0)
    erase(
        model,
        artifacts,
        [get_concept("style", 1)],
        METHOD,
        Protection(styles(0, 2), CONFIG.null_space),
        Path("none"),
    )
    return artifacts


def use_shift(model, artifacts: ArtifactPaths, path: Path, output_dir: Path):
    """Return what reads a shift and does with it what scripts do."""

    def read() -> None:
        shifts, _ = load_shifts(artifacts, str(path))
        for shift in shifts.values():
            shift.check(model)
        merge(model.denoiser, list(shifts.values()))
        truncate_shifts(model, shifts, ExportConfig(("lora",)))
        export(model, shifts, output_dir, ExportConfig(("lora", "kohya")), ["", "VanGogh"])

    return read


def test_metadata_of_a_shift(model, made, tmp_path):
    tensors, metadata = load_tensors(made.shift(1), SHIFT_FILE_TYPE)
    tensors, path = dict(tensors), tmp_path / "shift.safetensors"

    @examples(350)
    @given(changed_json(metadata))
    def check(text: str) -> None:
        try:
            changed = json.loads(text)
        except RecursionError:
            return
        save_tensors(path, tensors, SHIFT_FILE_TYPE, changed)
        if outcome(use_shift(model, made, path, tmp_path / "out" / "x")) == 2:
            assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir()), text
        shutil.rmtree(tmp_path / "out", ignore_errors=True)

    check()


def test_bytes_of_a_shift_and_of_a_basis(model, made, tmp_path):
    path = tmp_path / "changed.safetensors"
    uses = {
        made.shift(1).read_bytes(): use_shift(model, made, path, tmp_path / "out" / "x"),
        made.basis(1).read_bytes(): lambda: use_basis(model, path),
    }

    @examples(240)
    @given(st.sampled_from(list(uses)).flatmap(lambda content: st.tuples(st.just(content), changed_bytes(content))))
    def check(changed: tuple[bytes, bytes]) -> None:
        content, now = changed
        path.write_bytes(now)
        assert outcome(uses[content]) == 2 or now == content
        shutil.rmtree(tmp_path / "out", ignore_errors=True)

    check()


def use_basis(model, path: Path) -> None:
    NullSpaceBasis.load(path).check(model, path)


def test_metadata_of_a_basis(model, made, tmp_path):
    tensors, metadata = load_tensors(made.basis(1), BASIS_FILE_TYPE)
    tensors, concept = dict(tensors), get_concept("style", 1)

    @examples(100)
    @given(changed_json(metadata))
    def check(text: str) -> None:
        try:
            changed = json.loads(text)
        except RecursionError:
            return
        artifacts = ArtifactPaths(tmp_path, "SRS-ME", "tiny", "style", 1, 0)
        save_tensors(artifacts.basis(1), tensors, BASIS_FILE_TYPE, changed)
        outcome(lambda: use_basis(model, artifacts.basis(1)))
        protection = Protection(styles(0, 2), CONFIG.null_space)
        assert outcome(lambda: erase(model, artifacts, [concept], METHOD, protection, Path("none"))) == 0  # solved anew
        shutil.rmtree(tmp_path / "srs-me")

    check()


@pytest.fixture(scope="module")
def ledger(model, tmp_path_factory) -> Ledger:
    root = tmp_path_factory.mktemp("ledger")
    concepts = [get_concept("style", index) for index in range(3)]
    header = make_header(model, "style", concepts, ["a cat"], {"model": "models/mini-sd"})
    ledger = Ledger.create(root / HISTORY_FILE, header)
    ledger.append(create_shifts(ledger, model, concepts[1:2], METHOD, CONFIG.null_space, root))
    ledger.append({}, ["1"])
    return ledger


def use_ledger(path: Path) -> None:
    ledger = Ledger(path)
    status_table(ledger)
    ledger.history_lines()
    with contextlib.suppress(ValueError):
        reproduction_commands(ledger)


def test_a_history(ledger, tmp_path):
    lines = [json.loads(line) for line in ledger.path.read_text().splitlines()]
    path = tmp_path / HISTORY_FILE

    @examples(250)
    @given(st.integers(0, 2).flatmap(lambda number: st.tuples(st.just(number), changed_json(lines[number]))))
    def check(changed: tuple[int, str]) -> None:
        """Change one line, with digests that fit."""
        number, text = changed
        from hashlib import sha256

        written, last_hash = [], ""
        for k, line in enumerate(lines):
            own = text if k == number else json.dumps({**line, "prev_hash": last_hash})
            written.append(own)
            last_hash = sha256(own.encode()).hexdigest()
        path.write_text("\n".join(written) + "\n")
        outcome(lambda: use_ledger(path))

    check()

    @examples(150)
    @given(changed_bytes(ledger.path.read_bytes()))
    def check_bytes(content: bytes) -> None:
        path.write_bytes(content)
        outcome(lambda: use_ledger(path))

    check_bytes()


def test_metadata_of_an_export(model, made, tmp_path):
    shifts, _ = load_shifts(made, "1")
    folder = tmp_path / "out" / "x-lora"

    def write() -> None:
        export(model, shifts, tmp_path / "out" / "x", ExportConfig(("lora",)), ["", "VanGogh"])

    write()
    expected, document = files(folder), json.loads((folder / "metadata.json").read_text())

    @examples(120)
    @given(changed_json(document) | changed_bytes((folder / "metadata.json").read_bytes()))
    def check(changed: str | bytes) -> None:
        content = changed if isinstance(changed, bytes) else changed.encode()
        (folder / "metadata.json").write_bytes(content)
        before = files(folder)
        if outcome(write) == 2:
            assert files(folder) == before
        else:
            weights = {name: content for name, content in expected.items() if not name.endswith("metadata.json")}
            assert {name: content for name, content in files(folder).items() if name in weights} == weights
        (folder / "metadata.json").write_bytes(expected[str(folder / "metadata.json")])

    check()


def test_configs_of_a_model(tiny_path, tmp_path):
    folder = shutil.copytree(tiny_path, tmp_path / "tiny")
    paths = [path for path in sorted(folder.rglob("*.json")) if path.stat().st_size < 5000]
    documents = {path: json.loads(path.read_text()) for path in paths}
    requests = [(PromptCase("VanGogh", 1, 0), 0)]
    sampling = SamplingConfig(num_inference_steps=1)

    def use() -> None:
        list(generate(load_model(folder, CPU), requests, sampling))

    @examples(300)
    @given(st.sampled_from(paths).flatmap(lambda path: st.tuples(st.just(path), changed_json(documents[path]))))
    def check(changed: tuple[Path, str]) -> None:
        path, text = changed
        kept = path.read_text()
        path.write_text(text)
        try:
            outcome(use)
        finally:
            path.write_text(kept)

    check()


PROMPTS = "prompt,evaluation_seed,case_number\n" + 'a cat,3,0\n"a ""dog"", barking",4,1\n,5,2\n'


def test_a_prompt_list(tmp_path):
    path, copied = tmp_path / "list.csv", tmp_path / "copy.csv"

    @examples(250)
    @given(changed_bytes(PROMPTS.encode()))
    def check(content: bytes) -> None:
        path.write_bytes(content)
        copied.unlink(missing_ok=True)
        cases = []

        def use() -> None:
            cases.extend(read_prompt_csv(path))
            write_prompt_csv(copied, merge_prompt_csv(copied, cases))

        if outcome(use) == 0:
            assert read_prompt_csv(copied) == sorted(cases, key=lambda case: case.case_number)
        else:
            assert not copied.exists()

    check()


def test_yaml_files(tmp_path, monkeypatch):
    (tmp_path / "configs").mkdir()
    kept = {}
    for name in ("concepts.yaml", "logos.yaml", "scenes.yaml", "mini-sd.yaml"):
        source = concept_lists.REPO_ROOT / "configs" / name
        kept[name] = yaml.safe_load(source.read_text())
        shutil.copy(source, tmp_path / "configs" / name)
    monkeypatch.setattr(concept_lists, "REPO_ROOT", tmp_path)
    monkeypatch.setattr("ldm.config.scenes.REPO_ROOT", tmp_path)

    def use(name: str) -> None:
        path = tmp_path / "configs" / name
        if name == "mini-sd.yaml":
            read_yaml(path), read_model_config(path)
        elif name == "scenes.yaml":
            load_scene(4)
        else:
            for category in concept_lists.CATEGORIES:
                concept_lists.load_concepts(category)

    def clear() -> None:
        concept_lists._load_config.cache_clear()
        concept_lists.load_concepts.cache_clear()

    @examples(200)
    @given(st.sampled_from(sorted(kept)).flatmap(lambda name: st.tuples(st.just(name), changed_json(kept[name]))))
    def check(changed: tuple[str, str]) -> None:
        name, text = changed
        path = tmp_path / "configs" / name
        before = path.read_text()
        path.write_text(text)  # JSON is YAML
        clear()
        try:
            outcome(lambda: use(name))
        finally:
            path.write_text(before)
            clear()

    check()


def test_images(tmp_path):
    contents = {}
    for suffix, mode in ((".png", "RGB"), (".png", "I;16"), (".jpg", "RGB"), (".webp", "RGBA"), (".bmp", "P")):
        buffer = io.BytesIO()
        Image.new(mode, (32, 32)).save(buffer, Image.registered_extensions()[suffix])
        contents[suffix, mode] = buffer.getvalue()

    @examples(200)
    @given(
        st.sampled_from(sorted(contents)).flatmap(lambda kind: st.tuples(st.just(kind), changed_bytes(contents[kind])))
    )
    def check(changed: tuple[tuple[str, str], bytes]) -> None:
        (suffix, _), content = changed
        path = tmp_path / f"0_0{suffix}"
        path.write_bytes(content)
        assert is_image(path)
        outcome(lambda: load_batch(list_images(tmp_path)))
        path.unlink()

    check()


@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
def test_bytes_of_a_checkpoint(model, tiny_path, tmp_path, suffix):
    state_dicts = [part.state_dict() for part in (model.denoiser, model.vae, model.text_encoder)]
    tensors = {name: value.contiguous() for name, value in convert_to_compvis(*state_dicts).items()}
    path, config = tmp_path / f"tiny{suffix}", compvis_config(tiny_path, tmp_path)
    if suffix == ".ckpt":
        torch.save({"state_dict": tensors}, path)
    else:
        from safetensors.torch import save_file

        save_file(tensors, path)
    content = path.read_bytes()

    @examples(60)
    @given(changed_bytes(content))
    def check(changed: bytes) -> None:
        path.write_bytes(changed)
        outcome(lambda: load_model(path, CPU, config))

    check()
