"""What gates and a filter of keywords find, kind by kind, on gates whose decisions are known."""

import pytest
import torch
from conftest import CPU

from ldm.config.concept_lists import make_concept
from ldm.config.concepts import get_concept
from ldm.diffusion.load import load_model
from ldm.diffusion.tokenizer import read_whole
from ldm.erasure.effect import anchor_change
from ldm.erasure.embedding_map import fit_map
from ldm.erasure.gate import Gate
from ldm.erasure.gated_edit import LAST_STATE, GatedEdit, GatedPrompts
from ldm.erasure.leakage import joint_leakage
from ldm.erasure.merge import edited
from ldm.erasure.shift import EmbeddingShift, SeparableShift
from ldm.experiments.baselines import GATES, KEYWORDS, REWRITING
from ldm.experiments.detection import KindOfPrompts, _row, detection_table, prompts_about

VANGOGH, CEZANNE, FOX = get_concept("style", 1), get_concept("style", 0), make_concept("a red fox")
KINDS = [
    KindOfPrompts("quoted", VANGOGH, ['"VanGogh"', "'Van Gogh'", "a vangogh"], True),
    KindOfPrompts("quoted", CEZANNE, ['"Cezanne"'], True),
    KindOfPrompts("homophones", VANGOGH, ["van go", "van goff"], True),
    KindOfPrompts("near misses", VANGOGH, ["a white van", "the Van Gogh museum shop"], False),
    KindOfPrompts("titles", CEZANNE, [], True),
]


@pytest.fixture(scope="module")
def tiny(tiny_path):
    return load_model(tiny_path, CPU)


def shift_of(fires: bool) -> EmbeddingShift:
    """Return a gate that fires for every prompt, or for none, with a map that turns rows around."""
    rows = torch.randn(4, 96, generator=torch.Generator().manual_seed(0))
    gate = Gate(torch.zeros(1, 96), torch.tensor([-1.0 if fires else 1.0]), gap=0.5)
    maps = {"tokens": fit_map(rows, -rows, 0.1, 2)}
    return EmbeddingShift.none(GatedEdit({"text_encoder": gate}, {"text_encoder": LAST_STATE}, maps))


@pytest.fixture(scope="module")
def table(tiny):
    shifts = {VANGOGH.label: shift_of(True), CEZANNE.label: shift_of(False)}
    return detection_table(tiny, shifts, KINDS).set_index("prompts")


def test_each_concept_is_sought_by_its_own_gate(table):
    assert list(table.index) == ["quoted", "homophones", "near misses"]  # of a kind without prompts there is no row
    assert table.at["quoted", GATES].startswith("1 of 4 (")  # Cezanne's gate, whose prompt trips VanGogh's
    assert table.at["homophones", GATES].startswith("0 of 2 (")
    assert table.at["near misses", GATES].startswith("2 of 2 (")


def test_the_filter_finds_what_has_the_name_and_the_rewriting_needs_both(table):
    assert table.at["quoted", KEYWORDS].startswith("0 of 4 (") and table.at["quoted", REWRITING].startswith("1 of 4 (")
    for detector in (KEYWORDS, REWRITING):
        assert table.at["homophones", detector].startswith("2 of 2 (")
        assert table.at["near misses", detector].startswith("1 of 2 (")
    assert list(table["errors are"]) == ["misses", "misses", "false alarms"]


def test_the_change_is_leakage_over_what_the_name_alone_would_change(tiny, table):
    edit, prompts = shift_of(True).gated, ["van go", "van goff"]
    assert edit is not None
    read = tiny.encode_with_states(prompts, {"text_encoder": [LAST_STATE]})
    before = tiny.layer_inputs(read[0])
    after = tiny.layer_inputs(GatedPrompts({"": edit}, tiny.places)(*read))
    both = (dict(zip(prompts, each, strict=True)) for each in (before, after))
    leakages = joint_leakage(tiny.text_layers, [], *both)
    expected = sum(leakages.values()) / 2 / anchor_change(tiny, VANGOGH)
    assert expected > 0.01 and table.at["homophones", "change"] == pytest.approx(expected, abs=2e-3)


def test_a_prompt_that_trips_no_gate_does_not_change(tiny):
    alone = detection_table(tiny, {CEZANNE.label: shift_of(False)}, [KINDS[1]])
    assert alone["change"].tolist() == [0] and alone[GATES][0].startswith("1 of 1")


@pytest.mark.parametrize(
    ("gate", "keywords", "better"), [(0, 40, GATES), (40, 0, KEYWORDS), (20, 22, "neither"), (0, 0, "neither")]
)
def test_a_detector_has_fewer_errors_where_the_intervals_are_apart(gate, keywords, better):
    errors = {GATES: gate, KEYWORDS: keywords, REWRITING: 0}
    assert _row("quoted", True, errors, [0.0] * 50)["fewer errors"] == better


@pytest.mark.parametrize("concept", [VANGOGH, FOX], ids=["configured", "own"])
def test_prompts_about_a_concept_are_read_whole(tiny, concept):
    kinds = prompts_about(concept, tiny.tokenizers[0])
    prompts = [text for each in kinds for text in each.prompts]
    assert len(prompts) > 30 and read_whole(tiny.tokenizers[0], prompts) == set(prompts)
    names = {each.kind: each.is_meant for each in kinds}
    assert names["quoted"] and names.get("near misses", False) is False
    assert ("descriptions" in names) == (concept == VANGOGH)
    assert len(names) == len(kinds)


def test_a_concept_without_a_gate_is_one_line(tiny):
    message = "VanGogh has no shift with a gate here: erase it in the `form` gated first"
    with pytest.raises(ValueError, match=message):
        detection_table(tiny, {CEZANNE.label: shift_of(False)}, KINDS)
    linear = SeparableShift({}, torch.zeros(0, 96), 1.0)
    with pytest.raises(ValueError, match=message):
        detection_table(tiny, {VANGOGH.label: linear}, [KINDS[0]])


def test_a_model_that_shifts_act_on_is_refused(tiny):
    shifts = {VANGOGH.label: shift_of(True)}
    with edited(tiny, shifts, "gated"), pytest.raises(ValueError, match="end it first"):
        detection_table(tiny, shifts, [KINDS[0]])
