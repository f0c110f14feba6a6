"""What version 0.1 wrote is read, kept and continued today; tests/data/v0.1/make.py made the files by its scripts."""

import hashlib
import json
import runpy
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import CPU, ROOT, is_error
from PIL import Image

from ldm.cli.reproduce import reproduction_commands
from ldm.config import concepts as concept_lists
from ldm.config.methods import GateConfig, complete_settings
from ldm.config.models import ModelConfig, bundled_config, read_model_config, read_yaml
from ldm.diffusion.load import load_model
from ldm.erasure.methods import made_from
from ldm.erasure.null_space import NullSpaceBasis
from ldm.erasure.shift import DenseShift, SeparableShift, WeightShift
from ldm.io.files import file_digest, read_dir_metadata
from ldm.io.legacy import RENAMED_KEYS
from ldm.io.tensors import read_metadata
from ldm.ledger.ledger import HISTORY_FILE, Ledger
from ldm.ledger.operations import verify
from ldm.metrics.classify import CLASSIFIER_FILE_TYPE

SOLVE, ERASE, MERGE = "train-scripts/SRSME_Solution.py", "train-scripts/SRS_ME.py", "train-scripts/Merge_model.py"
DATA, GENERATE, LEDGER = (
    "eval-scripts/generate-data.py",
    "eval-scripts/generate-images-merge.py",
    "train-scripts/ledger.py",
)
V01 = ROOT / "tests" / "data" / "v0.1"
BASE_DIGEST = "099c54a6eb2e189218b4da77438109e168593ffd38919884794c6c9b00b53f85"


@pytest.fixture(scope="module")
def model_path(tmp_path_factory) -> Path:
    """Return the folder of the model that the files were made with, which is a formula."""
    folder = tmp_path_factory.mktemp("v0.1") / "tiny"
    runpy.run_path(str(V01 / "make.py"))["build_model"](folder)
    return folder


@pytest.fixture
def old(tmp_path) -> Path:
    """Return a copy of the files, to work on."""
    return Path(shutil.copytree(V01, tmp_path / "v0.1"))


@pytest.fixture
def old_concepts(old, monkeypatch):
    """Read concepts from the files of version 0.1, with its keys, in place of today's."""
    (old / "configs" / "many.yaml").rename(old / "configs" / "logos.yaml")
    monkeypatch.setattr(concept_lists, "REPO_ROOT", old)
    for cached in (concept_lists._load_config, concept_lists.load_concepts):
        cached.cache_clear()
    yield
    for cached in (concept_lists._load_config, concept_lists.load_concepts):
        cached.cache_clear()


@pytest.fixture
def common(old, model_path, old_concepts):
    """Return the flags that the files were made with, spelt as they were."""
    return ["--model", model_path, "--shifts_path", old / "shifts", "--erase_cat", "style"]


def contents(folder: Path) -> dict[Path, tuple[int, bytes]]:
    """Return when each file below a folder was written, and what is in it."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


def test_the_base_digest_of_a_model_is_what_it_was(model_path):
    assert load_model(model_path, CPU).digests[1] == BASE_DIGEST


def test_no_old_key_is_left_in_any_header(old):
    for path in old.rglob("*.safetensors"):
        file_type = {"basis": "null space basis", "shift": "weight shift", "classifier": "classifier"}[
            path.stem.split("-")[0]
        ]
        metadata = read_metadata(path, file_type)
        assert metadata and not set(metadata) & set(RENAMED_KEYS), path
        assert not set(metadata.get("config", ())) & set(RENAMED_KEYS), path


def test_a_basis_is_read(old):
    basis = NullSpaceBasis.load(old / "shifts/srs-me/tiny/style/scene1/time0/basis-1.safetensors")
    expected = {
        "created_by": "SRSME_Solution.py",
        "base_model": "tiny",
        "base_digest": BASE_DIGEST,
        "category": "style",
        "concept_index": 1,
        "concept": "VanGogh",
        "always_protected_weight": 1.0,
        "rank_rtol": 1e-6,
        "rank": 27,
        "protected": ["", "watermark SRS-ME", "CCS 2024", "Cezanne", "Picasso"],
    }
    assert {name: basis.metadata[name] for name in expected} == expected
    assert basis.vectors.shape == (21, 48) and 0 < basis.metadata["max_leakage"] < 1e-5


def test_a_separable_and_a_dense_shift_are_read(old):
    shift = WeightShift.load(old / "shifts/srs-me/tiny/style/scene1/time0/shift-1.safetensors")
    assert isinstance(shift, SeparableShift) and shift.rank == 2
    expected = {"created_by": "SRS_ME.py", "category": "style", "concept_index": 1, "iterations": 2, "rank_rtol": 1e-6}
    assert {name: shift.metadata[name] for name in expected} == expected
    assert shift.metadata["config"] == {
        "mode": "learn",
        "init": "closed_form",
        "anchor": "category",
        "ridge_weight": 0.003,
        "preserve_scale": 0,
        "vocab_preserve_scale": 0,
        "target_templates": 0,
        "max_directions": 4,
        "basis_scale": 1e-4,
        "lr": 0.1,
        "l1_weight": 1e-6,
        "stop_threshold": -1.0,
        "max_steps": 2,
        "train_batch_size": 1,
        "seed": 0,
    }
    dense = WeightShift.load(old / "shifts/fmn/tiny/style/scene1/time0/shift-1.safetensors")
    assert isinstance(dense, DenseShift) and all("attn2" in name for name in dense.parameter_names)
    config = {"lr": 0.1, "max_steps": 1, "train_batch_size": 1, "seed": 0, "train_method": "xattn"}
    assert dense.metadata["method"] == "FMN" and dense.metadata["config"] == config


def test_a_closed_form_says_so(old):
    shift = WeightShift.load(old / "ledger/shifts/srs-me/tiny/style/scene0/time1/shift-1.safetensors")
    config = shift.metadata["config"]
    assert config["mode"] == "closed_form" and config["anchor"] == "empty" and config["ridge_weight"] == 0.01
    assert "max_steps" not in config and shift.metadata["iterations"] == 0


def test_a_classifiers_header_is_read(old):
    metadata = read_metadata(old / "classifier.safetensors", CLASSIFIER_FILE_TYPE)
    classes = ["blank", "Cezanne", "VanGogh", "Picasso"]
    own = {"created_by": "artist-cls-train.py", "category": "style", "classes": classes, "accuracy": 0.25, "size": 64}
    assert metadata == own


def test_a_basis_is_kept_where_it_would_be_solved_again(script, common, old):
    before = contents(old / "shifts")
    flags = ["--erased_index", "1", "--em_indexes", "0,2", "--tolerance", "1e-6", "--device", "cpu"]
    code, out, err = script(SOLVE, *common, *flags)
    assert code == 0 and "rank 27 of 48, 21 directions free" in out, err
    assert contents(old / "shifts") == before


def test_shifts_are_there_already(script, common, old):
    before = contents(old / "shifts")
    training = ["--data_path", old / "data", "--erased_index", "1", "--lr", "0.1", "--devices", "cpu"]
    settings = ["--max_base", "4", "--threshold", "-1", "--init", "closed-form", "--anchor", "category"]
    settings += ["--template_set", "category", "--target_templates", "0"]  # the defaults of then
    for name in ("preserve", "captions_preserve", "neutral_preserve", "others_preserve"):
        settings += [f"--{name}_scale", "0"]
    code, out, err = script(ERASE, *common, *training, "--iter_break", "2", *settings)
    assert code == 0 and "shift-1.safetensors is there already, from the same inputs" in out, err
    code, out, err = script("train-scripts/FMN.py", *common, *training, "--iter_break", "1")
    assert code == 0 and "shift-1.safetensors is there already, from the same inputs" in out, err
    assert contents(old / "shifts") == before
    assert "there already" not in script(ERASE, *common, *training, "--iter_break", "1", *settings)[1]


def test_a_folder_of_images_is_resumed(script, common, old):
    folder = old / "images" / "1-merge"
    metadata = read_dir_metadata(folder)
    assert metadata["num_inference_steps"] == 3 and metadata["shifts"]["1"]["config"]["max_steps"] == 2
    lost = np.asarray(Image.open(folder / "1_0.png")).astype(int)
    (folder / "1_0.png").unlink()
    before = contents(folder)
    flags = ["--merge", "1", "--prompts_path", old / "prompts.csv", "--save_path", old / "images", "--device", "cpu"]
    is_error(script(GENERATE, *common, *flags, "--ddim_steps", "4"), "another run", "recipe.json", "--save_path")
    assert contents(folder) == before
    code, out, err = script(GENERATE, *common, *flags, "--ddim_steps", "3")
    assert code == 0 and "1 images generated, 3 in" in out, err
    after = contents(folder)
    images = [path for path in before if path.suffix == ".png"]
    assert len(images) == 2 and all(after[path] == before[path] for path in images)
    assert (
        np.abs(np.asarray(Image.open(folder / "1_0.png")).astype(int) - lost).max() <= 2
    )  # of 255, whatever the machine
    assert "0 images generated, 3 in" in script(GENERATE, *common, *flags, "--ddim_steps", "3")[1]


def test_a_folder_of_images_that_is_whole_keeps_its_digest(script, common, old):
    """A shift that was trained on a folder names its digest: generating it again must not train the shift again."""
    folder = old / "images" / "1-merge"
    digest = file_digest(folder)
    flags = ["--merge", "1", "--prompts_path", old / "prompts.csv", "--save_path", old / "images", "--device", "cpu"]
    assert script(GENERATE, *common, *flags, "--ddim_steps", "3")[0] == 0
    assert file_digest(folder) == digest


def test_rendered_images_are_resumed(script, old_concepts, old):
    flags = ["--model_name", "paint", "--prompt", "VanGogh", "--save_path", old / "painted"]
    assert read_dir_metadata(old / "painted" / "VanGogh")["synthetic"] is True
    is_error(script(DATA, *flags, "--num_seeds", "3"), "another run", "recipe.json", "--save_path")
    assert script(DATA, *flags, "--num_seeds", "2")[0] == 0
    assert len(list((old / "painted" / "VanGogh").glob("*.png"))) == 2


def test_merged_weights_are_kept(script, common, old):
    for folder in (old / "merged").iterdir():
        (folder / "weights.safetensors").write_bytes(b"left out of the repository")
    before = contents(old / "merged")
    flags = ["--merge", "1", "--save_path", old / "merged", "--format", "diffusers,lora", "--device", "cpu"]
    is_error(script(MERGE, *common, *flags, "--dtype", "float16"), "another run", "recipe.json", "--save_path")
    code, out, err = script(MERGE, *common, *flags)
    assert code == 0 and str(old / "merged" / "tiny-1-lora") in out, err
    assert contents(old / "merged") == before


def test_a_merged_model_takes_the_settings_of_its_base(model_path, old, tmp_path):
    merged = Path(shutil.copytree(model_path, tmp_path / "tiny-1"))
    shutil.copy(old / "merged" / "tiny-1" / "recipe.json", merged)
    assert load_model(merged, CPU).config_name == "tiny"


def test_an_old_ledger_is_read_with_its_chain(old):
    path = old / "ledger" / HISTORY_FILE
    ledger = Ledger(path)
    own = {"base_model": "tiny", "base_digest": BASE_DIGEST, "category": "style", "concepts": [0, 1, 2]}
    assert {name: ledger.header[name] for name in own} == own
    assert ledger.header["protected"] == ["", "watermark SRS-ME", "CCS 2024", "a cat"]
    assert [entry.index for entry in ledger.entries] == [1, 2, 3, 4]
    assert ledger.last_hash == hashlib.sha256(path.read_text().splitlines()[-1].encode()).hexdigest()
    assert [set(ledger.active_shifts(number)) for number in range(5)] == [set(), {"1"}, set(), {"1"}, {"1", "2"}]
    record = ledger.last_shift("2")
    assert record["iterations"] == 0 and record["max_leakage_others"] == pytest.approx(2.154e-05, rel=1e-3)
    lines = path.read_text().splitlines()
    for line, (written, changed) in enumerate(
        [('"base": "tiny"', '"base": "tinx"'), ('"bytes": 3696', '"bytes": 3697')]
    ):
        path.write_text("\n".join([*lines[:line], lines[line].replace(written, changed), *lines[line + 1 :]]) + "\n")
        with pytest.raises(ValueError, match=f"line {line + 2}, is not what was written there"):
            Ledger(path)


@pytest.mark.slow
def test_an_old_ledger_is_continued(script, old_concepts, model_path, old):
    root, model = ["--ledger_dir", old / "ledger"], ["--model", model_path, "--device", "cpu"]
    path = old / "ledger" / HISTORY_FILE
    written = path.read_text()
    rows = {row.split(" | ")[1]: row for row in script(LEDGER, "status", *root)[1].splitlines()}
    assert (
        "| erased | SRS-ME | 2 | 3 | 0 |  |  | 3.483e-07 |" in rows["VanGogh"] and "| never_erased |" in rows["Cezanne"]
    )
    assert "erased VanGogh by SRS-ME" in script(LEDGER, "history", *root)[1]
    assert script(LEDGER, "restore", "VanGogh", *root)[0] == 0
    assert script(LEDGER, "erase", "VanGogh", *root)[0] == 0  # by the shift that version 0.1 made
    closed_form = ["--mode", "closed_form", "--init", "closed_form"]
    code, out, err = script(LEDGER, "erase", "Cezanne", *root, *model, *closed_form, "--least_effect", "-9")
    assert code == 0 and "| 0 | Cezanne |" in out, err
    assert path.read_text().startswith(written)
    lines = path.read_text().splitlines()
    assert json.loads(lines[5])["prev_hash"] == hashlib.sha256(lines[4].encode()).hexdigest()
    ledger = Ledger(path)
    assert set(ledger.active_shifts()) == {"0", "1", "2"} and len(ledger.entries) == 7
    assert ledger.last_shift("1")["shift"] == json.loads(lines[1])["erase"]["1"]["shift"]
    assert script(LEDGER, "verify", *root, *model)[0] == 0
    table = verify(ledger, load_model(model_path, CPU)).set_index("item")
    assert len(table) == 2 + 3 + 2 and table.loc["no shift", "sha256"]


@pytest.mark.slow
def test_an_old_ledger_is_migrated_to_one_that_no_list_can_change(script, old_concepts, model_path, old):
    root, model = ["--ledger_dir", old / "ledger"], ["--model", model_path, "--device", "cpu"]
    path = old / "ledger" / HISTORY_FILE
    before, content = Ledger(path), path.read_bytes()
    is_error(script(LEDGER, "add", "--concepts", "violin", *root, *model), "older version", "migrate it first")
    code, out, err = script(LEDGER, "migrate", *root)
    sha256 = hashlib.sha256(content).hexdigest()
    kept = path.with_name(f"{HISTORY_FILE}.v1-{sha256[:8]}")
    assert code == 0 and str(kept) in out and kept.read_bytes() == content, err
    after = Ledger(path)
    assert after.header["migrated_from"] == {"file": kept.name, "sha256": sha256} and after.version == 2
    assert after.concepts == before.concepts and after.prompts == before.prompts and after.entries == before.entries
    assert after.active_shifts() == before.active_shifts() and after.header["time"] == before.header["time"]
    with pytest.MonkeyPatch.context() as patch:  # whatever becomes of the lists of concepts
        patch.setattr(concept_lists, "_load_config", lambda: ({}, ()))
        assert Ledger(path).concepts == before.concepts
    code, out, err = script(LEDGER, "verify", *root, *model)
    assert code == 0 and kept.name in out, err
    is_error(script(LEDGER, "migrate", *root), "today's version already")
    closed_form = ["--mode", "closed_form", "--init", "closed_form", "--least_effect", "-9"]
    assert script(LEDGER, "erase", "Cezanne", *root, *model, *closed_form)[0] == 0
    assert script(LEDGER, "add", "--concepts", "a violin", *root, *model)[0] == 0
    assert [concept.label for concept in Ledger(path).concepts] == ["0", "1", "2", "violin"]
    kept.write_bytes(content + b" ")
    is_error(script(LEDGER, "verify", *root, *model), "is not the ledger that was migrated")
    kept.unlink()
    assert "no longer there" in script(LEDGER, "verify", *root, *model)[1]


def test_the_commands_that_make_an_old_ledger_again_work(script, old_concepts, model_path, old, tmp_path):
    ledger = Ledger(old / "ledger" / HISTORY_FILE)
    for line in reproduction_commands(ledger):
        line = line.replace(str(ledger.root), str(tmp_path / "again")).replace(ledger.header["model"], str(model_path))
        _, path, *arguments = shlex.split(line)
        code, _, err = script(path, *arguments)
        assert code in (0, 3), f"{line}: {err}"  # 3 of a weak erasure, of which an old ledger says nothing
    again = Ledger(tmp_path / "again" / HISTORY_FILE)
    assert len(again.entries) == 4 and set(again.active_shifts()) == {"1", "2"}
    for name, shift in ledger.shifts().items():
        made = again.shifts()[name].on(load_model(model_path, CPU).text_layers)
        assert made.parameter_names == shift.parameter_names
        settings = complete_settings("SRS-ME", shift.metadata["config"])
        assert made.metadata["config"].items() <= settings.items()  # today only settings that act
        for parameter in shift.parameter_names:
            before = shift.delta_weight(parameter)
            # These embeddings leave projections that are near their rounding, which is another on other processors.
            assert (made.delta_weight(parameter) - before).norm() < 0.1 * before.norm()


def test_old_concept_files_are_read(old_concepts):
    def load():  # but the aliases, of which there are more today
        lists = {category: concept_lists.load_concepts(category) for category in concept_lists.CATEGORIES}
        return {name: [replace(concept, aliases=()) for concept in concepts] for name, concepts in lists.items()}

    read = load()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(concept_lists, "REPO_ROOT", ROOT)
        concept_lists._load_config.cache_clear()
        concept_lists.load_concepts.cache_clear()
        assert read == load()
    assert read["style"][1].anchor_prompt == "painting" and read["style"][1].held_out_prompts == [
        "a landscape by VanGogh"
    ]


@pytest.mark.parametrize("name", ["mini-sd", "mini-many", "stable-diffusion/v1-inference"])
def test_old_model_configs_mean_what_they_meant(name):
    path = V01 / "configs" / f"{name}.yaml"
    read, todays = read_model_config(path), bundled_config(name)
    if name.startswith("stable-diffusion"):
        todays = ModelConfig()  # the paper's, which a closed form with a retain set has replaced since
    assert (read.sampling, read.null_space, read.evaluation) == (todays.sampling, todays.null_space, todays.evaluation)
    # Which no older version had; the first weighs nothing but a user's own prompts.
    new = {"retain_preserve_scale", "repel_weight"}
    if name != "mini-many":  # which takes mini-sd's of today
        assert read.methods["SRS-ME-dagger"].init == "zero"
    for method, config in todays.methods.items():
        if method in ("SRS-ME-dagger", "UCE", "SPEED"):  # today's start from the closed form, and newer methods
            continue
        before, now = (
            {key: value for key, value in each.acting().items() if key not in new}
            for each in (read.methods[method], config)
        )
        assert before == now, method


def test_the_renamed_model_keeps_its_settings():
    assert bundled_config("mini-many") == bundled_config("mini-sd-logos") != bundled_config("mini-sd")


def test_old_dataset_and_training_settings_are_read():
    old, todays = read_yaml(V01 / "configs" / "mini-sd.yaml"), read_yaml(ROOT / "configs" / "mini-sd.yaml")
    for section in ("seed", "dataset", "tokenizer", "text_encoder", "vae", "unet", "scheduler", "train"):
        assert old[section] == todays[section], section


def test_what_is_upgraded_twice_is_upgraded_once(old):
    from ldm.io.legacy import upgrade

    for path in old.rglob("recipe.json"):
        once = upgrade(json.loads(path.read_text()))
        assert upgrade(once) == once
    assert (
        file_digest(old / "data" / "VanGogh")
        == read_metadata(old / "shifts/srs-me/tiny/style/scene1/time0/shift-1.safetensors", "weight shift")[
            "data_digest"
        ]
    )


def test_a_gate_of_an_older_file_was_fitted_without_lists_of_words():
    older = {name: value for name, value in GateConfig(word_lists=0).to_dict().items() if name != "word_lists"}
    assert made_from({"gate_config": GateConfig(word_lists=0).to_dict()}, {"gate_config": older}, "SRS-ME")
    assert not made_from({"gate_config": GateConfig().to_dict()}, {"gate_config": older}, "SRS-ME")
    assert made_from({"gate_config": GateConfig().to_dict()}, {}, "SRS-ME")  # of a file that does not say it
