import pandas as pd
import pytest
import torch
from PIL import Image

from ldm.experiments.ablations import Variant, run_ablation
from ldm.io.files import file_digest
from ldm.config.concepts import get_concept, load_concepts
from ldm.config.scenes import SceneStep, load_scene
from ldm.experiments.experiment import Experiment
from ldm.io.images import image_filename, save_image
from ldm.io.prompts import PromptCase, write_prompt_csv
from ldm.ledger.ledger import Ledger
from ldm.diffusion.load import load_model
from ldm.experiments.scenes import run_scene, scene_grid, summarize, wide_table
from ldm.erasure.shift import SeparableShift, WeightShift
from ldm.io.paths import ArtifactPaths

from conftest import CPU

PROMPTS = [*(concept.prompt for concept in load_concepts("style")), ""]


class Owner:
    """An experiment that draws nothing: it notes what is asked of it."""

    category = "style"

    def __init__(self, folder):
        self.folder, self.shift, self.measured = folder, [], []
        self.model = type("Model", (), {"name": "m", "digest": "0"})

    def learn(self, store, concepts, protected, given):
        for concept in concepts:
            self.shift.append((store.time, concept.index, tuple(protected)))
            SeparableShift({"a": torch.zeros(2, 1)}, torch.ones(1, 3), 1.0).save(
                store.shift(concept.index), {"erased_index": concept.index, "steps": 3, "rank": 2})

    def measure(self, shifts, name):
        self.measured.append(name)
        return self._table(shifts), self.images(shifts, name)

    def _table(self, shifts):
        return pd.DataFrame({"prompt": PROMPTS, "accuracy_before": 100.0, "lpips": 0.25, "largest_pixel": 1.0, "psnr": 40.0,
                             "accuracy_after": [0.0 if str(k) in shifts else 90.0 for k in range(len(PROMPTS))],
                             "fd_alexnet": 2.0})

    def images(self, shifts, name):
        folder = self.folder / (name if shifts else "ori")
        cases = [PromptCase(prompt, k, k) for k, prompt in enumerate(PROMPTS)]
        write_prompt_csv(folder / "prompts.csv", cases)
        for case in cases:
            save_image(folder / image_filename(case.number, 0), Image.new("RGB", (64, 64), "gray"))
        return folder


def test_a_scene_is_played_with_every_shift_made_once(tmp_path):
    owner, moments = Owner(tmp_path), load_scene(4)
    table, folders = run_scene(owner, "FMN", 4, moments, tmp_path / "shifts", {})
    assert [(time, index) for time, index, _ in owner.shift] == [(0, 0), (0, 1), (0, 2), (1, 3), (1, 4), (2, 5)]
    assert {protected for *_, protected in owner.shift} == {(0, 1, 2, 3, 4, 5)}  # from the first time on
    assert owner.measured == ["FMN-012", "FMN-1234", "FMN-2345", "FMN-345"]
    status = table.set_index(["time", "prompt"]).status
    assert status[0, "Cezanne"] == "erased" and status[1, "Cezanne"] == "restored" and status[0, "Caravaggio"] == "regular"
    assert set(status[:, "CCS 2024"]) == set(status[:, ""]) == {"protected"}

    means = summarize(table, "fd_alexnet").set_index(["time", "status"])
    assert (means.accuracy.xs("erased", level="status") == 0).all() and means.accuracy[3, "regular"] == 90
    assert list(means.index)[:3] == [(0, "erased"), (0, "regular"), (0, "protected")]
    cells = wide_table(table, "style", "fd_alexnet").set_index("time")
    assert cells.Cezanne[0] == "E 2.00 / 0 / 0.250" and cells.Cezanne[1] == "R 2.00 / 90 / 0.250"
    assert cells["Kilian Eng"][3] == "2.00 / 90 / 0.250" and cells["(blank)"][0] == "40.0 / 2.5e-01"
    sheet = scene_grid(owner, moments, {"FMN": folders})
    colours = {colour for _, colour in sheet.getcolors(10**6)}
    assert {(220, 20, 60), (50, 205, 50)} <= colours  # red and green frames


def test_an_ablation_varies_one_choice_and_keeps_its_shifts_apart(tmp_path):
    owner = Owner(tmp_path)
    variants = [Variant(0.0, {"reg_beta": 0.0}, [0]), Variant(1.0, {"reg_beta": 1.0}, [0, 3])]
    table = run_ablation(owner, tmp_path / "shifts", "x", [0], variants).set_index(["value", "prompt"])
    assert table.status[0.0, "Jackson Pollock"] == "regular" and table.status[1.0, "Jackson Pollock"] == "protected"
    assert table.status[1.0, "Cezanne"] == "erased" and table.status[1.0, ""] == "protected"
    assert owner.measured == ["x-0.0", "x-1.0"] and len(list((tmp_path / "shifts").rglob("shift-0.safetensors"))) == 2


def test_all_of_the_category_can_be_protected(tmp_path):
    owner = Owner(tmp_path)
    run_scene(owner, "SRS-ME", 4, load_scene(4)[:1], tmp_path / "shifts", {}, everything=True)
    assert {protected for *_, protected in owner.shift} == {tuple(range(9))}


def test_a_scene_leaves_the_ledger_of_its_moves(tmp_path):
    owner, moments = Owner(tmp_path), load_scene(4)
    run_scene(owner, "FMN", 4, moments, tmp_path / "shifts", {})
    ledger = Ledger(tmp_path / "shifts" / "scene4-style-FMN.jsonl")
    assert [tuple(ledger.state(number + 1)) for number in range(4)] == [moment.erased for moment in moments]
    run_scene(owner, "ESD", 4, moments, tmp_path / "shifts", {})
    text = ledger.path.read_text()
    run_scene(owner, "FMN", 4, moments, tmp_path / "shifts", {})  # plays it anew, to the same lines
    assert ledger.path.read_text() == text


def test_a_concept_erased_again_gets_its_first_shift(tmp_path):
    owner = Owner(tmp_path)
    moments = [SceneStep(0, (1,), (1,), ()), SceneStep(1, (), (), (1,)), SceneStep(2, (1,), (1,), ())]
    table, _ = run_scene(owner, "SRS-ME", 9, moments, tmp_path / "shifts", {})
    assert [(time, index) for time, index, _ in owner.shift] == [(0, 1)] and owner.measured == ["SRS-ME-1", "SRS-ME-", "SRS-ME-1"]
    assert list(table[table.prompt == "VanGogh"].status) == ["erased", "restored", "erased"]


@pytest.fixture
def begin(tiny_path, tmp_path):
    """Begins an experiment, each time as a new process would."""
    return lambda: Experiment(load_model(tiny_path, CPU), "style", tmp_path / "run", None,
                              {"ddim_steps": 2, "guidance_scale": 2.0, "batch_size": 32}, samples=2, pictures=3)


GIVEN = {"lr": 0.1, "scale_factor": 1.0, "threshold": -1e9, "reg_beta": 0.0, "iter_break": 12, "max_base": None, "batch_size": 2,
         "templates": 0, "init": "zero", "ridge": 0.1, "keep": 1.0, "spare": 1.0, "anchor": "blank", "seed": 0}


def test_an_experiment_draws_each_set_of_weights_once(begin, tmp_path, monkeypatch):
    experiment = begin()
    store = ArtifactPaths(tmp_path / "shifts", "SRS-ME", experiment.model.name, "style", 1, 0)
    concepts = [get_concept("style", 1)]
    solution = {"basis": "svd", "tolerance": 1e-7, "templates": 0, "always": 1}
    assert len(experiment.learn(store, concepts, [1, 2], GIVEN, solution)) == 1
    assert experiment.learn(store, concepts, [1, 2], GIVEN, solution) == []
    assert len(list((tmp_path / "run" / "pictures" / "VanGogh").glob("*.png"))) == 3
    shifts = {"1": WeightShift.load(store.find_shift(1))}
    monkeypatch.setattr("ldm.experiment.compare", lambda before, after, *rest: pd.DataFrame({"folder": [after.name]}))
    table, folder = experiment.measure(shifts, "x-1")
    first = table.folder[0]
    assert folder.name == first
    drawn = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*.png")}
    for again in (experiment, begin()):
        assert again.measure(shifts, "x-1")[0].folder[0] == first and first.startswith("x-1-")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*.png")} == drawn
    assert len(drawn) == 3 + 2 * 12 * 2  # pictures, and two images of twelve prompts by two sets of weights


def test_pictures_to_learn_from_have_seeds_that_no_image_has(begin, tmp_path):
    experiment = begin()
    store = ArtifactPaths(tmp_path / "shifts", "FMN", experiment.model.name, "style", 1, 0)
    experiment.learn(store, [get_concept("style", 1)], [], {"lr": 1e-3, "iter_break": 1, "batch_size": 1, "seed": 0,
                                                            "train_method": "xattn"})
    learnt = pd.read_csv(tmp_path / "run" / "pictures" / "VanGogh" / "prompts.csv").evaluation_seed
    evaluated = pd.read_csv(experiment.images({}, "") / "prompts.csv").evaluation_seed
    assert not set(learnt) & set(evaluated) and experiment.images({}, "").name == "ori"


def test_a_scene_that_was_cut_off_goes_on_to_the_same_table(begin, tmp_path, monkeypatch):
    monkeypatch.setattr("ldm.experiment.compare", lambda before, after, *rest: pd.DataFrame(
        {"prompt": [""], "images": [sum(file_digest(path) != "" for path in after.glob("*.png"))]}))
    moments, shifts = [SceneStep(0, (1,), (1,), ()), SceneStep(1, (2,), (2,), (1,))], tmp_path / "shifts"
    given = GIVEN | {"iter_break": 3}
    table, folders = run_scene(begin(), "SRS-ME", 4, moments, shifts, given)
    files = {path: path.read_bytes() for path in [*shifts.rglob("*.safetensors"), *(tmp_path / "run").rglob("*.png")]}
    next(shifts.rglob("time1/shift-2.safetensors")).unlink()
    (folders[1] / "3_0.png").unlink()
    kept = {path: path.stat().st_mtime_ns for path in files if path.exists()}
    again, places = run_scene(begin(), "SRS-ME", 4, moments, shifts, given)
    assert again.equals(table) and places == folders
    assert {path: path.read_bytes() for path in files} == files  # the two that were missing are the same again
    assert {path: path.stat().st_mtime_ns for path in kept} == kept  # and nothing else was written


def test_other_settings_are_another_set_of_weights(begin, tmp_path, monkeypatch):
    monkeypatch.setattr("ldm.experiment.compare", lambda before, after, *rest: pd.DataFrame({"prompt": [""]}))
    moments = [SceneStep(0, (1,), (1,), ())]
    places = [run_scene(begin(), "FMN", 4, moments, tmp_path / "shifts", {"lr": lr, "iter_break": 1, "batch_size": 1, "seed": 0,
                                                                     "train_method": "xattn"})[1][0] for lr in (1e-3, 1e-2)]
    assert places[0] != places[1] and all(len(list(place.glob("*.png"))) == 24 for place in places)
