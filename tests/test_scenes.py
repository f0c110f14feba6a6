"""Scenes, experiments and ablations: every shift and image is made once, and a run that was cut off resumes."""

import pandas as pd
import pytest
import torch
from conftest import CPU
from PIL import Image

from ldm.cli.reproduce import reproduction_commands
from ldm.config.concepts import get_concept, load_concepts
from ldm.config.methods import ESDConfig, ForgetMeNotConfig, NullSpaceConfig, SamplingConfig, SRSMEConfig
from ldm.config.scenes import SceneStep, load_scene
from ldm.diffusion.load import load_model
from ldm.erasure.shift import SeparableShift, WeightShift
from ldm.experiments.ablations import INITIALIZATIONS, Variant, run_ablation
from ldm.experiments.experiment import Experiment
from ldm.experiments.scenes import run_scene, scene_grid, summarize, wide_table
from ldm.io.files import file_digest
from ldm.io.images import image_filename, save_image
from ldm.io.paths import ArtifactPaths
from ldm.io.prompts import PromptCase, write_prompt_csv
from ldm.ledger.ledger import Ledger

PROMPTS = [*(concept.prompt for concept in load_concepts("style")), ""]
FMN = ForgetMeNotConfig(lr=1e-3, max_steps=1)
SRS_ME = SRSMEConfig(
    lr=0.1,
    basis_scale=1.0,
    stop_threshold=-1e9,
    l1_weight=0.0,
    max_steps=12,
    max_directions=None,
    train_batch_size=2,
    ridge_weight=0.1,
    preserve_scale=1.0,
    vocab_preserve_scale=1.0,
)


class FakeExperiment:
    """An experiment that generates nothing: it notes what is asked of it."""

    category = "style"

    def __init__(self, folder):
        self.folder, self.erased, self.evaluated, self.configs = folder, [], [], []
        self.model = type("Model", (), {"name": "m", "digest": "0"})
        self.unprotected = pd.DataFrame()

    def erase(self, artifacts, concepts, protected_indices, config):
        self.configs.append(config)
        for concept in concepts:
            self.erased.append((artifacts.time, concept.index, tuple(protected_indices)))
            shift = SeparableShift({"a": torch.zeros(2, 1)}, torch.ones(1, 3), 1.0)
            made_from = {"concept_index": concept.index, "config": config.acting()}
            shift.save(artifacts.shift(concept.index), made_from | {"iterations": 3, "rank": 2})

    def evaluate(self, shifts, name):
        self.evaluated.append(name)
        return self._table(shifts), self.generate(shifts, name)

    def evaluate_unprotected(self, shifts, name, erased):
        return self.unprotected.copy()

    def _table(self, shifts):
        accuracies = [0.0 if str(k) in shifts else 90.0 for k in range(len(PROMPTS))]
        constants = {"lpips": 0.25, "unchanged": 0.95, "max_abs_diff": 1.0, "psnr": 40.0, "fd_alexnet": 2.0}
        return pd.DataFrame({"prompt": PROMPTS, "accuracy_before": 100.0, "accuracy_after": accuracies, **constants})

    def generate(self, shifts, name):
        folder = self.folder / (name if shifts else "ori")
        cases = [PromptCase(prompt, k, k) for k, prompt in enumerate(PROMPTS)]
        write_prompt_csv(folder / "prompts.csv", cases)
        for case in cases:
            save_image(folder / image_filename(case.case_number, 0), Image.new("RGB", (64, 64), "gray"))
        return folder


def test_a_scene_runs_with_every_shift_made_once(tmp_path):
    experiment, steps = FakeExperiment(tmp_path), load_scene(4)
    table, folders = run_scene(experiment, FMN, 4, steps, tmp_path / "shifts")
    made = [(time, index) for time, index, _ in experiment.erased]
    assert made == [(0, 0), (0, 1), (0, 2), (1, 3), (1, 4), (2, 5)]
    assert {protected for *_, protected in experiment.erased} == {(0, 1, 2, 3, 4, 5)}  # from the first time on
    assert experiment.evaluated == ["FMN-012", "FMN-1234", "FMN-2345", "FMN-345"]
    status = table.set_index(["time", "prompt"]).status
    assert status[0, "Cezanne"] == "erased" and status[1, "Cezanne"] == "restored"
    assert status[0, "Caravaggio"] == "regular"
    assert set(status[:, "CCS 2024"]) == set(status[:, ""]) == {"protected"}

    means = summarize(table, "fd_alexnet").set_index(["time", "status"])
    assert (means.accuracy.xs("erased", level="status") == 0).all() and means.accuracy[3, "regular"] == 90
    assert means.unchanged[0, "protected"] == pytest.approx(0.95)
    assert list(means.index)[:3] == [(0, "erased"), (0, "regular"), (0, "protected")]
    cells = wide_table(table, "style", "fd_alexnet").set_index("time")
    assert cells.Cezanne[0] == "E 2.00 / 0 / 0.250 / 0.95" and cells.Cezanne[1] == "R 2.00 / 90 / 0.250 / 0.95"
    assert cells["Kilian Eng"][3] == "2.00 / 90 / 0.250 / 0.95" and cells["(empty)"][0] == "40.0 / 2.5e-01 / 0.95"
    grid = scene_grid(experiment, steps, {"FMN": folders})
    colors = {color for _, color in grid.getcolors(10**6)}
    assert {(220, 20, 60), (50, 205, 50)} <= colors  # red and green borders


def test_a_scene_has_rows_of_prompts_that_nothing_protects(tmp_path):
    experiment, steps = FakeExperiment(tmp_path), load_scene(4)
    alone = summarize(run_scene(experiment, FMN, 4, steps, tmp_path / "shifts")[0], "fd_alexnet")
    kin = {"status": "kin", "prompt": "Paul Klee", "lpips": 0.5, "unchanged": 0.0, "max_abs_diff": 9.0, "psnr": 20.0}
    word = {**kin, "status": "words", "prompt": "bay", "unchanged": 1.0}
    composition = {**kin, "status": "erased compositions", "prompt": "a church by VanGogh"}
    experiment.unprotected = pd.DataFrame([kin, word, composition])
    table, _ = run_scene(experiment, FMN, 4, steps, tmp_path / "shifts")
    means = summarize(table, "fd_alexnet")
    last = ["regular", "protected", "erased compositions", "kin", "words"]
    assert means[means.time == 0].status.tolist() == ["erased", *last]
    unchanged = means.set_index(["time", "status"]).unchanged
    assert unchanged[3, "kin"] == 0 and unchanged[3, "words"] == 1
    assert means[~means.status.isin(last[2:])].reset_index(drop=True).equals(alone)  # the other rows stay as they were
    assert not {"Paul Klee", "bay"} & set(wide_table(table, "style", "fd_alexnet"))


def test_an_ablation_varies_one_choice_and_keeps_its_shifts_apart(tmp_path):
    experiment = FakeExperiment(tmp_path)
    variants = [
        Variant(0.0, SRS_ME.with_changes(l1_weight=0.0), [0]),
        Variant(1.0, SRS_ME.with_changes(l1_weight=1.0), [0, 3]),
    ]
    table = run_ablation(experiment, tmp_path / "shifts", "x", [0], variants).set_index(["value", "prompt"])
    assert table.status[0.0, "Jackson Pollock"] == "regular" and table.status[1.0, "Jackson Pollock"] == "protected"
    assert table.status[1.0, "Cezanne"] == "erased" and table.status[1.0, ""] == "protected"
    assert set(table.iterations) == {3} and set(table["rank"]) == {2}
    assert experiment.configs == [variant.config for variant in variants]
    assert experiment.evaluated == ["x-0.0", "x-1.0"]
    assert len(list((tmp_path / "shifts").rglob("shift-0.safetensors"))) == 2


def test_the_initializations_are_the_closed_form_the_gradient_and_both():
    configs = {name: SRS_ME.with_changes(**changes) for name, changes in INITIALIZATIONS.items()}
    assert {name: (config.init, config.trains) for name, config in configs.items()} == {
        "closed form": ("closed_form", False),
        "gradient": ("zero", True),
        "closed form, then gradient": ("closed_form", True),
    }


def test_all_of_the_category_can_be_protected(tmp_path):
    experiment = FakeExperiment(tmp_path)
    run_scene(experiment, SRS_ME, 4, load_scene(4)[:1], tmp_path / "shifts", protect_all=True)
    assert {protected for *_, protected in experiment.erased} == {tuple(range(9))}


def test_a_scenes_ledger_names_the_command_that_runs_it(tmp_path):
    config = FMN.with_changes(lr=0.01, seed=7)
    run_scene(FakeExperiment(tmp_path), config, 4, load_scene(4), tmp_path / "all", protect_all=True)
    (command,) = reproduction_commands(Ledger(tmp_path / "all" / "scene4-style-FMN.jsonl"), {"model": "models/own"})
    assert command == (
        "python eval-scripts/scenes.py --model models/own --category style --scene 4 --methods FMN --protect_scope all "
        "--seed 7 --set FMN.lr=0.01 FMN.max_steps=1"
    )


def test_a_scene_leaves_the_ledger_of_its_erasures(tmp_path):
    experiment, steps = FakeExperiment(tmp_path), load_scene(4)
    run_scene(experiment, FMN, 4, steps, tmp_path / "shifts")
    ledger = Ledger(tmp_path / "shifts" / "scene4-style-FMN.jsonl")
    active = [list(ledger.active_shifts(index + 1)) for index in range(4)]
    assert active == [list(map(str, step.erased)) for step in steps]
    run_scene(experiment, ESDConfig(), 4, steps, tmp_path / "shifts")
    text = ledger.path.read_text()
    run_scene(experiment, FMN, 4, steps, tmp_path / "shifts")  # runs it anew, to the same lines
    assert ledger.path.read_text() == text


def test_a_concept_erased_again_gets_its_first_shift(tmp_path):
    experiment = FakeExperiment(tmp_path)
    steps = [SceneStep(0, (1,), (1,), ()), SceneStep(1, (), (), (1,)), SceneStep(2, (1,), (1,), ())]
    table, _ = run_scene(experiment, SRS_ME, 9, steps, tmp_path / "shifts")
    assert [(time, index) for time, index, _ in experiment.erased] == [(0, 1)]
    assert experiment.evaluated == ["SRS-ME-1", "SRS-ME-", "SRS-ME-1"]
    assert list(table[table.prompt == "VanGogh"].status) == ["erased", "restored", "erased"]


@pytest.fixture
def make_experiment(tiny_path, tmp_path):
    """Return a function that makes an experiment, each time as a new process would."""
    sampling = SamplingConfig(num_inference_steps=2, guidance_scale=2.0, sample_batch_size=32)

    def make():
        model = load_model(tiny_path, CPU)
        return Experiment(model, "style", tmp_path / "run", None, sampling, seeds_per_prompt=2, num_training_images=3)

    return make


def modified_times(paths):
    return {path: path.stat().st_mtime_ns for path in paths if path.exists()}


def test_an_experiment_generates_by_each_set_of_weights_once(make_experiment, tmp_path, monkeypatch):
    experiment = make_experiment()
    artifacts = ArtifactPaths(tmp_path / "shifts", "SRS-ME", experiment.model.name, "style", 1, 0)
    concepts = [get_concept("style", 1)]
    assert len(experiment.erase(artifacts, concepts, [1, 2], SRS_ME, NullSpaceConfig())) == 1
    assert experiment.erase(artifacts, concepts, [1, 2], SRS_ME, NullSpaceConfig()) == []
    assert len(list((tmp_path / "run" / "training-images" / "VanGogh").glob("*.png"))) == 3
    shifts = {"1": WeightShift.load(artifacts.find_shift(1))}
    monkeypatch.setattr(
        "ldm.experiments.experiment.compare",
        lambda original, edited, *_: pd.DataFrame({"folder": [edited.name]}),
    )
    table, folder = experiment.evaluate(shifts, "x-1")
    first = table.folder[0]
    assert folder.name == first
    generated = modified_times((tmp_path / "run").rglob("*.png"))
    for again in (experiment, make_experiment()):
        assert again.evaluate(shifts, "x-1")[0].folder[0] == first and first.startswith("x-1-")
    assert modified_times((tmp_path / "run").rglob("*.png")) == generated
    assert len(generated) == 3 + 2 * 12 * 2  # training images, and two of twelve prompts by two sets of weights


def test_prompts_that_nothing_protects_have_images_of_their_own(make_experiment, tmp_path, monkeypatch):
    experiment = make_experiment()
    artifacts = ArtifactPaths(tmp_path / "shifts", "SRS-ME", experiment.model.name, "style", 1, 0)
    experiment.erase(artifacts, [get_concept("style", 1)], [1, 2], SRS_ME, NullSpaceConfig())
    shifts = {"1": WeightShift.load(artifacts.find_shift(1))}
    assert experiment.evaluate_unprotected(shifts, "x-1", [1]).empty  # none are asked for

    def list_prompts(original, edited, *_):
        accuracies = {"accuracy_before": 100.0, "accuracy_after": 100.0}
        return pd.DataFrame({"prompt": pd.read_csv(edited / "prompts.csv").prompt, **accuracies})

    monkeypatch.setattr("ldm.experiments.experiment.compare", list_prompts)
    experiment.unprotected_prompts = 2
    table = experiment.evaluate_unprotected(shifts, "x-1", [1])
    statuses = ["captions", "words", "kin", "near_misses"]
    assert table.status.tolist() == [
        *(status for status in statuses for _ in range(2)),
        "compositions",
        "erased compositions",
    ]
    assert set(table[table.accuracy_after.notna()].status) == {"compositions", "erased compositions"}
    folders = list((tmp_path / "run" / "unprotected").iterdir())
    assert len(folders) == 2 and all(len(list(folder.glob("*.png"))) == 10 for folder in folders)
    generated = modified_times((tmp_path / "run").rglob("*.png"))
    again = make_experiment()
    again.unprotected_prompts = 3
    assert len(again.evaluate_unprotected(shifts, "x-1", [1])) == 15
    fewer = make_experiment()
    fewer.unprotected_prompts = 1
    assert len(fewer.evaluate_unprotected(shifts, "x-1", [1])) == 5  # of the fifteen that are there
    assert modified_times(generated) == generated  # none of the first was generated again


def test_training_images_have_seeds_that_no_other_image_has(make_experiment, tmp_path):
    experiment = make_experiment()
    artifacts = ArtifactPaths(tmp_path / "shifts", "FMN", experiment.model.name, "style", 1, 0)
    experiment.erase(artifacts, [get_concept("style", 1)], [], FMN)
    training_dir = tmp_path / "run" / "training-images" / "VanGogh"
    trained = pd.read_csv(training_dir / "prompts.csv").evaluation_seed
    evaluated = pd.read_csv(experiment.generate({}, "") / "prompts.csv").evaluation_seed
    assert not set(trained) & set(evaluated) and experiment.generate({}, "").name == "ori"


@pytest.mark.slow
def test_a_scene_that_was_cut_off_resumes_to_the_same_table(make_experiment, tmp_path, monkeypatch):
    def count_images(original, edited, *_):
        digests = [file_digest(path) for path in edited.glob("*.png")]
        return pd.DataFrame({"prompt": [""], "images": [sum(digest != "" for digest in digests)]})

    monkeypatch.setattr("ldm.experiments.experiment.compare", count_images)
    steps, shifts = [SceneStep(0, (1,), (1,), ()), SceneStep(1, (2,), (2,), (1,))], tmp_path / "shifts"
    config = SRS_ME.with_changes(max_steps=3)
    table, folders = run_scene(make_experiment(), config, 4, steps, shifts)
    paths = [*shifts.rglob("*.safetensors"), *(tmp_path / "run").rglob("*.png")]
    contents = {path: path.read_bytes() for path in paths}
    next(shifts.rglob("time1/shift-2.safetensors")).unlink()
    (folders[1] / "3_0.png").unlink()
    kept = modified_times(paths)
    again, places = run_scene(make_experiment(), config, 4, steps, shifts)
    assert again.equals(table) and places == folders
    assert {path: path.read_bytes() for path in paths} == contents  # the two that were missing are the same again
    assert {path: path.stat().st_mtime_ns for path in kept} == kept  # and nothing else was written


def test_other_settings_are_another_set_of_weights(make_experiment, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "ldm.experiments.experiment.compare", lambda original, edited, *_: pd.DataFrame({"prompt": [""]})
    )
    steps, places = [SceneStep(0, (1,), (1,), ())], []
    for lr in (1e-3, 1e-2):
        places += run_scene(make_experiment(), FMN.with_changes(lr=lr), 4, steps, tmp_path / "shifts")[1]
    assert places[0] != places[1] and all(len(list(place.glob("*.png"))) == 24 for place in places)
