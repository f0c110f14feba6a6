"""The robustness suite: what its tables say, and that each probe finds a leak that is there."""

import math
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import CPU, is_error, styles
from PIL import Image

from ldm.config.concept_lists import make_concept
from ldm.config.concepts import OWN, get_concept, watermark_prompts
from ldm.config.everyday import compositions_of
from ldm.config.methods import METHODS, SamplingConfig
from ldm.config.models import bundled_config, load_model_config
from ldm.config.robustness import HardPromptConfig, RelearningConfig, SoftPromptConfig
from ldm.config.spellings import says
from ldm.diffusion.completion import complete, find_completion
from ldm.diffusion.load import load_model
from ldm.experiments.named_shifts import NamedShifts
from ldm.experiments.probe import UNCHANGED, UNEDITED, Bench, Finding, Subject
from ldm.experiments.probe_others import LPIPS, Neighbours, Restoration, Watermarks, grouped_prompts
from ldm.experiments.probe_prompts import KEPT, Compositions, PromptKinds
from ldm.experiments.probe_sampling import Completion, Samplers, with_scheduler
from ldm.experiments.robustness import (
    NOT_MEASURABLE,
    all_probes,
    ask,
    ask_floor,
    compare_findings,
    robustness_contenders,
    summarize,
    summary_markdown,
)
from ldm.io.images import find_images
from ldm.io.paths import REPO_ROOT
from ldm.io.prompts import read_prompt_csv
from ldm.metrics.classify import classifier_path, load_classifier
from ldm.metrics.judge import ClassifierJudge

SAMPLING = SamplingConfig(num_inference_steps=2, guidance_scale=1.5, sample_batch_size=8)


class RedJudge:
    """Take an image for any concept where it is more red than green."""

    name = "red"

    def knows(self, concept) -> bool:
        return True

    def shows(self, paths, concept) -> list[bool]:
        means = [np.asarray(Image.open(path), dtype=float).mean((0, 1)) for path in paths]
        return [bool(mean[0] > mean[1]) for mean in means]


@pytest.fixture
def bench(mini_path, tmp_path):
    model = load_model(mini_path, CPU)
    judge = RedJudge()
    return Bench(model, "style", tmp_path, judge, SAMPLING, styles(1), styles(2), judge, images=4)


def finding_rows(contender, *findings, concept="VanGogh", probe="p"):
    rows = [{"contender": contender, "concept": concept, "probe": probe} | vars(each) for each in findings]
    return pd.DataFrame(rows).assign(low=math.nan, high=math.nan)


def test_findings_stand_beside_the_unedited_model_and_the_floor():
    table = compare_findings(
        pd.concat(
            [
                finding_rows("floor", Finding.share("names", 1, 10)),
                finding_rows("unedited", Finding.share("names", 9, 10), Finding.share("haiku", 4, 10)),
                finding_rows("UCE", Finding.share("names", 3, 10), Finding.share("haiku", 0, 10)),
                finding_rows("ESD", Finding.share("names", 0, 10), Finding.share("haiku", 5, 10)),
                finding_rows("UCE", Finding("names", "LPIPS", 10, 0.25)),
            ],
            ignore_index=True,
        )
    )
    assert set(table["contender"]) == {"UCE", "ESD"}
    named = table[(table["kind"] == "names") & (table["measure"] == "shown")]
    assert (named["unedited"] == 0.9).all() and (named["floor"] == 0.1).all() and (named["note"] == "").all()
    assert (table[table["kind"] == "haiku"]["note"] == NOT_MEASURABLE).all()
    summary = summarize(table).set_index(["kind", "measure"])
    assert summary.loc[("names", "shown"), "UCE"] == "30 % (11 to 60)"  # Wilson's interval of 3 of 10
    assert summary.loc[("names", "shown"), "ESD"] == "0 % (0 to 28)"
    assert summary.loc[("haiku", "shown"), "ESD"] == NOT_MEASURABLE
    assert summary.loc[("names", "LPIPS"), "UCE"] == "0.25" and summary.loc[("names", "LPIPS"), "ESD"] == ""
    assert "| names | shown | 90 % | 10 % | 30 % (11 to 60) |" in summary_markdown(summary.reset_index())


def test_srs_me_takes_part_in_both_forms_and_trained():
    contenders = robustness_contenders(list(METHODS), bundled_config("mini-sd").methods)
    forms = {contender.name: contender.form for contender in contenders}
    assert forms["SRS-ME gated"] == "gated" and forms["SRS-ME linear"] == forms["ESD"] == "linear"
    trains = {contender.name: contender.config.trains for contender in contenders}
    assert trains["SRS-ME trained"] and not trains["SRS-ME linear"]


def test_compositions_say_the_concept_and_something_else():
    for concept, category in (
        (get_concept("style", 1), "style"),
        (get_concept("object", 1), "object"),
        (make_concept("a red fox"), "own"),
    ):
        prompts = compositions_of(concept, category, 5)
        assert len(set(prompts)) == 5 and all(says(prompt, concept.spellings) for prompt in prompts), prompts
        assert not any(prompt == concept.prompt for prompt in prompts)


def test_prompts_are_those_of_which_the_model_reads_the_name(bench):
    concept = get_concept("style", 1)
    kinds = bench.name_kinds(concept)
    assert len(kinds) >= 15 and "long, name last" not in kinds  # a tiny model reads 16 tokens
    assert all(kinds.values()) and sum(map(len, kinds.values())) >= 80


@pytest.mark.slow
def test_every_probe_answers_and_makes_nothing_twice(bench, monkeypatch):
    every = all_probes(SoftPromptConfig(), HardPromptConfig(), RelearningConfig())
    probes = [probe for probe in every if not probe.is_slow]
    first = [*ask_floor(bench, probes), *ask(bench, UNEDITED, probes)]
    count = len(find_images(bench.folder))
    monkeypatch.setattr("ldm.diffusion.image_folder.generate", lambda _, missing, __: missing and pytest.fail("again"))
    monkeypatch.setattr("ldm.experiments.probe_sampling.complete", lambda *_: pytest.fail("completed again"))
    again = [*ask_floor(bench, probes), *ask(bench, UNEDITED, probes)]
    pd.testing.assert_frame_equal(pd.concat(first), pd.concat(again))
    assert len(find_images(bench.folder)) == count > 100


def test_nothing_changes_where_nothing_is_erased(bench):
    concept = get_concept("style", 1)
    nothing = Subject("nothing")
    found = {finding.kind: finding for finding in Neighbours().measure(bench, nothing, concept)}
    assert found["all"].hits == found["all"].n > 700 and found["the most changed"].value == 0
    restored = Restoration().measure(bench, nothing, concept)
    by_measure = {measure: [each for each in restored if each.measure == measure] for measure in (LPIPS, UNCHANGED)}
    assert by_measure[LPIPS] and all(each.value == 0 for each in by_measure[LPIPS])
    assert all(each.hits == each.n for each in by_measure[UNCHANGED])


def test_a_scheduler_acts_for_a_while_and_images_say_so(bench, tmp_path):
    model, before = bench.model, bench.model.scheduler
    metadata = model.generation_metadata
    with with_scheduler(model, "EulerDiscreteScheduler", {}):
        assert type(model.scheduler).__name__ == model.generation_metadata["scheduler"] == "EulerDiscreteScheduler"
        euler = bench.generate(UNEDITED, tmp_path / "euler", ["VanGogh"], 1)
    assert model.scheduler is before and model.generation_metadata is metadata
    own = bench.generate(UNEDITED, tmp_path / "own", ["VanGogh"], 1)
    assert euler[0].read_bytes() != own[0].read_bytes()


def test_images_are_completed_where_they_are_hidden_alone(tmp_path):
    model = load_model(REPO_ROOT / "models" / "mini-sd", CPU)
    left = Image.new("RGB", (64, 64), (200, 40, 40))
    hidden = torch.zeros(16, 16)
    hidden[:, 8:] = 1
    pipe = find_completion(model)
    made = complete(model, pipe, [left], "VanGogh", [0], 4, 1.5, hidden=hidden)[0]
    again = complete(model, pipe, [left], "VanGogh", [0], 4, 1.5, hidden=hidden)[0]
    other = complete(model, pipe, [left], "VanGogh", [1], 4, 1.5, hidden=hidden)[0]
    pixels = [np.asarray(image, dtype=float) for image in (made, again, other)]
    assert (pixels[0] == pixels[1]).all()
    right, left_side = (np.abs(pixels[0] - pixels[2])[:, part].mean() for part in (slice(40, 64), slice(0, 24)))
    assert right > 3 * left_side  # what is painted is of the seed, and nothing else is
    assert np.abs(pixels[0][:, :24] - (200, 40, 40)).mean() < 20


@pytest.mark.slow
def test_probes_find_what_an_unedited_model_leaks(tmp_path):
    model = load_model(REPO_ROOT / "models" / "mini-sd", CPU)
    judges = [ClassifierJudge(load_classifier(classifier_path(name), CPU)[0]) for name in ("style", "object")]
    sampling = load_model_config(model).sampling
    bench = Bench(model, "style", tmp_path, judges[0], sampling, styles(1), styles(2), judges[1], images=8)
    concept = get_concept("style", 1)
    for probe, least in ((PromptKinds(), 0.7), (Compositions(), 0.9), (Completion(), 0.9), (Samplers(), 0.9)):
        shown = [each for each in probe.measure(bench, UNEDITED, concept) if each.measure == "shown"]
        floor = [each for each in probe.floor(bench, concept) if each.measure == "shown"]
        shares = [sum(each.hits or 0 for each in side) / sum(each.n for each in side) for side in (shown, floor)]
        assert shares[0] >= least and shares[1] <= shares[0] - 0.4, (probe.name, shares)
    kept = [each for each in Compositions().measure(bench, UNEDITED, concept) if each.measure == KEPT]
    assert kept[0].n == 8


def test_a_watermark_that_an_erased_prompt_draws_is_found(bench, monkeypatch):
    concept = get_concept("style", 1)
    probe = Watermarks()
    clean = {each.kind: each for each in probe.measure(bench, Subject("clean"), concept)}
    made = bench.generate
    # A planted leak: in place of the concept's, the images of the first watermark.
    monkeypatch.setattr(
        bench,
        "generate",
        lambda subject, folder, prompts, number=0: made(
            subject, folder, [watermark_prompts()[0]] if subject.name == "leaky" else prompts, number
        ),
    )
    leaky = {each.kind: each for each in probe.measure(bench, Subject("leaky"), concept)}
    assert leaky["nearest"].value == 0 < clean["nearest"].value
    assert leaky["nearer than the empty prompt's"].hits


def test_a_prompt_that_changes_has_the_same_number_whatever_is_erased(bench, monkeypatch):
    monkeypatch.setattr("ldm.experiments.probe_others._predictions", lambda _, __, prompts: torch.ones(len(prompts), 1))
    first = next(iter(grouped_prompts("style")))
    for concept in (*styles(1), make_concept(first)):  # which takes the first prompt away from the second
        assert Neighbours().measure(replace(bench, erased=[concept]), Subject("nothing"), concept)[0].value == 0
    listed = read_prompt_csv(bench.folder / UNEDITED.folder / Neighbours.name / "prompts.csv")
    assert [case.prompt for case in listed] == list(grouped_prompts("style"))[: len(listed)] and len(listed) == 41
    assert [case.case_number for case in listed] == list(range(41))


def test_a_composition_is_one_of_which_the_model_reads_the_name(bench):
    concept = make_concept("a red fox")
    own = replace(bench, category=OWN, erased=[concept])
    prompts = own.compositions(concept)
    tokenizer = bench.model.tokenizers[0]
    assert len(prompts) == own.images and all(
        "red fox" in tokenizer.decode(tokenizer(p, truncation=True).input_ids) for p in prompts
    )
    cut = make_concept("a red fox " + "which sits beside a church and a garbage truck and a french horn")
    assert own.compositions(cut) == [] and Compositions().measure(own, UNEDITED, cut) == []


def named_shift(gated=False, alone=False, **metadata):
    """Return what is asked of a shift: what its header says, and whether it has a gate, or is one alone."""
    return SimpleNamespace(metadata=metadata, path="shift", gated=gated or alone or None, is_gate_alone=alone)


def of_style(index: int, name: str, method: str = "SRS-ME", **gate):
    return named_shift(concept=name, concept_index=index, category="style", method=method, **gate)


def test_shifts_of_one_category_are_asked_about_its_concepts_in_each_form_in_which_they_differ():
    gated, uce = of_style(1, "VanGogh", gated=True), of_style(1, "VanGogh", "UCE")
    named = NamedShifts.of([uce, of_style(2, "Picasso"), gated], "object")
    assert named.category == "style" and named.concepts == styles(1, 2)
    assert named.shifts["1"] is gated  # by whose label detectors find its gate
    assert {label: concept.index for label, concept in named.owners.items()} == {"1": 1, "1-1": 1, "2": 2}
    subjects = named.subjects([get_concept("style", 2)])
    assert [subject.name for subject in subjects] == ["SRS-ME + UCE VanGogh gated", "SRS-ME + UCE VanGogh linear"]
    assert all(set(map(id, subject.shifts.values())) == {id(gated), id(uce)} for subject in subjects)
    for shifts, forms in (
        ([uce], ["linear"]),
        ([of_style(0, "Cezanne", alone=True)], ["gated"]),
        ([of_style(0, "Cezanne", alone=True), uce], ["gated"]),
        ([of_style(0, "Cezanne", alone=True), gated], ["gated", "linear"]),
    ):
        assert [subject.form for subject in NamedShifts.of(shifts, "style").subjects([])] == forms


def test_shifts_of_a_user_and_of_several_categories_are_asked_about_by_name():
    fox = named_shift(concept="red fox", category=OWN, concept_kind="object", aliases=["vixen"], method="SRS-ME")
    other = named_shift(concept="Red  Fox", category=OWN, concept_kind="object", aliases=["Reynard"], method="UCE")
    church = named_shift(concept="church", category="object", concept_index=1, method="SRS-ME")
    named = NamedShifts.of([fox, other, of_style(1, "VanGogh"), church], "style")
    assert named.category == OWN and [concept.label for concept in named.concepts] == ["redfox", "vangogh", "church"]
    assert named.concepts[0].aliases == ("vixen", "Reynard") and named.concepts[0].kind == "object"
    assert NamedShifts.of([of_style(1, "Matisse")], "style").concepts == [make_concept("Matisse")]  # of another list
    older = named_shift(concept_index=4, category="object")
    assert NamedShifts.of([older], "style").concepts == [get_concept("object", 4)]
    with pytest.raises(ValueError, match="does not say which concept"):
        NamedShifts.of([named_shift(concept_index=400, category="object")], "style")


QUICK = ["--probes", "compositions,restoration", "--images", "2", "--num_inference_steps", "2"]
SHIFTS = "eval-scripts/robustness.py"


def test_shifts_for_concepts_that_nobody_configured_are_asked_about(script, mini_path, clip_path, tmp_path):
    model = shutil.copytree(mini_path, tmp_path / "a model of mine")
    given = ["--model", model, "--artifacts_dir", tmp_path / "shifts"]
    concepts = ["--concepts", "a red fox", "VanGogh", "--protect", "a dog"]
    assert script("train-scripts/SRS_ME.py", *given, *concepts, "--least_effect", -9)[0] == 0
    assert script("train-scripts/UCE.py", *given, "--concepts", "a red fox")[0] == 0
    files = {
        (path.parts[-6], path.stem): path for path in (tmp_path / "shifts").rglob("shift-*.safetensors")
    }  # by method and concept
    fox, uce = files["srs-me", "shift-redfox"], files["uce", "shift-redfox"]
    asked = [*given, *QUICK, "--save_path", tmp_path / "out"]
    is_error(script(SHIFTS, *asked, "--shifts", fox), "no classifier here tells red fox", "--clip_path")
    both = ["--shifts", f"{fox},{uce}", "VanGogh", "--restored", "Van Gogh"]
    code, out, err = script(SHIFTS, *asked, *both, "--clip_path", clip_path)
    assert code == 0 and "1 of 1: SRS-ME + UCE red fox linear, linear: redfox, redfox-1" in out, err
    [table] = (tmp_path / "out" / OWN).glob("*/robustness.csv")
    found = pd.read_csv(table)
    assert set(found["contender"]) == {"unedited", "floor", "SRS-ME + UCE red fox linear"}
    assert set(found["probe"]) == {"compositions", "restoration"}
    assert set(found[found["probe"] == "compositions"]["concept"]) == {"red fox"}
    # The classifier of styles knows what a user calls VanGogh, and without `restored` nothing is restored.
    code, out, err = script(SHIFTS, *asked, "--shifts", "VanGogh")
    assert code == 0 and "SRS-ME VanGogh linear" in out, err
    [table] = (tmp_path / "out" / OWN).glob("vangogh-*/robustness.csv")
    assert set(pd.read_csv(table)["probe"]) == {"compositions"}


def test_methods_are_set_beside_shifts_where_they_are_typed(script, mini_path, tmp_path):
    given = ["--model", mini_path, "--artifacts_dir", tmp_path / "shifts"]
    assert script("train-scripts/UCE.py", *given, "--category", "object", "--erased_index", "1,3")[0] == 0
    [place] = (tmp_path / "shifts").rglob("object/scene1/time0")
    files = ",".join(str(path) for path in sorted(place.glob("shift-*.safetensors")))
    asked = [*given, *QUICK, "--save_path", tmp_path / "out", "--shifts", files, "--restored", "tench"]
    code, out, err = script(SHIFTS, *asked, "--methods", "UCE")
    assert code == 0 and "1 of 2: UCE church linear, linear: 1" in out and "2 of 2: UCE, linear: 1" in out, err
    [table] = (tmp_path / "out" / "object").glob("*/robustness.csv")
    asked_of = {name: part["kind"].tolist() for name, part in pd.read_csv(table).groupby("contender")}
    assert asked_of["UCE church linear"] == asked_of["UCE"] and len(asked_of["UCE"]) > 5


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--shifts"], ["--shifts names no shift"]),
        (["--shifts", "none.safetensors"], ["none.safetensors"]),
        (["--shifts", "1", "--erased_index", "1"], ["--erased_index and --shifts"]),
        (["--shifts", "1", "--form", "gated"], ["--form"]),
        (["--shifts", "1", "--methods", "none"], ["'none' is no method"]),
        (["--method", "UCE"], ["--method says which shifts", "--methods"]),
        (["--scene", "2"], ["--scene says which shifts"]),
    ],
)
def test_arguments_of_shifts_that_say_nothing_are_refused(script, mini_path, tmp_path, arguments, words):
    is_error(script(SHIFTS, "--model", mini_path, "--save_path", tmp_path / "out", *arguments), *words)


def test_what_is_restored_is_among_the_concepts_of_shifts_and_leaves_some(script, mini_path, tmp_path):
    given = ["--model", mini_path, "--artifacts_dir", tmp_path / "shifts"]
    assert script("train-scripts/UCE.py", *given, "--erased_index", "1")[0] == 0
    assert script("train-scripts/UCE.py", *given, "--concepts", "a red fox")[0] == 0
    asked = [*given, *QUICK, "--save_path", tmp_path / "out", "--method", "UCE", "--shifts", "1"]
    is_error(script(SHIFTS, *asked, "--restored", "0"), "--restored names 'Cezanne'")
    is_error(script(SHIFTS, *asked, "--restored", "1"), "--restored names every concept")
    is_error(script(SHIFTS, *asked, "a red fox", "--methods", "UCE"), "--methods", "leave --methods out")
