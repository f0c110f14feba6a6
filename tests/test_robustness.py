"""The robustness suite: what its tables say, and that each probe finds a leak that is there."""

import math

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import CPU, styles
from PIL import Image

from ldm.config.concept_lists import make_concept
from ldm.config.concepts import get_concept, watermark_prompts
from ldm.config.everyday import compositions_of
from ldm.config.methods import METHODS, SamplingConfig
from ldm.config.models import bundled_config, load_model_config
from ldm.config.robustness import HardPromptConfig, RelearningConfig, SoftPromptConfig
from ldm.config.spellings import says
from ldm.diffusion.completion import complete, find_completion
from ldm.diffusion.load import load_model
from ldm.experiments.probe import UNCHANGED, UNEDITED, Bench, Finding, Subject
from ldm.experiments.probe_others import LPIPS, Neighbours, Restoration, Watermarks
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
