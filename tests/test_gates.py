"""Measuring gates: lists of concepts and captions as they are read, and counts of gates whose decisions are known."""

import json
from dataclasses import replace

import pandas as pd
import pytest
import torch
from conftest import is_error
from transformers import BertTokenizer

from ldm.config.concepts import Concept
from ldm.config.everyday import everyday_captions, kin_names
from ldm.config.spellings import says
from ldm.config.templates import fill, load_template_set
from ldm.erasure.embedding_map import fit_map
from ldm.erasure.gate import Gate
from ldm.erasure.gate_fitter import GateFitter
from ldm.erasure.gated_edit import LAST_STATE, GatedEdit
from ldm.experiments import gates
from ldm.experiments.gates import FittedGates, evaluate_gates, fit_gates, format_rate
from ldm.experiments.prompt_sets import (
    HELD_OUT,
    MISSPELT,
    RESPELT,
    RESTORED,
    SHARED,
    TEMPLATES,
    make_prompt_sets,
    read_captions,
)
from ldm.io.paths import REPO_ROOT
from ldm.io.prompts import make_cases, write_prompt_csv

HEADER = "name,kind,aliases\n"
CONCEPTS = [Concept(0, "Monet", "Monet", kind="style"), Concept(1, "Nike", "Nike", kind="brand")]


def gate_that(fires: bool, width: int) -> GatedEdit:
    """Return an edit whose gate fires for every prompt, or for none, by a margin of 1."""
    gate = Gate(torch.zeros(1, width), torch.tensor([-1.0 if fires else 1.0]), gap=0.5)
    return GatedEdit({"text_encoder": gate}, {"text_encoder": LAST_STATE}, {})


def test_a_list_of_concepts_that_is_not_there_is_one_line(script, tmp_path):
    is_error(
        script("eval-scripts/evaluate-gates.py", "--concepts", tmp_path / "none.csv"), "there is no list of concepts"
    )


def test_a_restored_concept_that_is_not_in_the_list_is_one_line(script, tmp_path):
    path = tmp_path / "list.csv"
    path.write_text(HEADER + "Monet,artist,\nNike,brand,\n")
    result = script("eval-scripts/evaluate-gates.py", "--concepts", path, "--restored", "nike", "Monnet")
    is_error(result, "--restored names 'Monnet', which is not in the list of concepts, did you mean Monet?")


def test_captions_are_lines_or_a_prompt_list(tmp_path):
    lines, table = tmp_path / "lines.txt", tmp_path / "table.csv"
    lines.write_text("a dog, asleep\n\n  a cat \na dog, asleep\n")
    write_prompt_csv(table, make_cases(["a dog, asleep"], 2, 0))
    assert list(read_captions([lines])[0].prompts) == ["a dog, asleep", "a cat"]
    assert list(read_captions([table])[0].prompts) == ["a dog, asleep"]
    (tmp_path / "more").mkdir()
    same_name = tmp_path / "more" / "lines.txt"
    same_name.write_text("a cow")
    found = read_captions([lines, table, same_name, lines])
    assert [each.name for each in found] == [str(lines), "table.csv", str(same_name)]  # by which results are told apart
    lines.write_text("\n")
    with pytest.raises(ValueError, match="has no captions"):
        read_captions([lines])
    lines.write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match="no text in UTF-8"):
        read_captions([lines])


def test_prompts_that_are_made_of_a_name_say_it_and_misspelt_ones_do_not(tiny):
    found = {each.name: each for each in make_prompt_sets(CONCEPTS, 10, tiny.tokenizers[0])}
    for name in (HELD_OUT, TEMPLATES, MISSPELT):  # of other spellings some are the name in another case
        assert set(found[name].owners) == {0, 1}
        for prompt, owner in zip(found[name].prompts, found[name].owners, strict=True):
            assert says(prompt, CONCEPTS[owner].spellings) == (name != MISSPELT)
    assert not set(found[HELD_OUT].prompts) & set(found[TEMPLATES].prompts)
    assert len(found["everyday captions"].prompts) == 10 and kin_names()[0] in found["kin names"].prompts


def test_a_gate_that_always_fires_has_all_false_alarms_and_one_that_never_does_all_misses(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(gates, "_NUM_TIMED", 1)
    path = tmp_path / "captions.txt"
    path.write_text("a dog\na lake by Monet\nnew shoes by nike\n")
    edits = [gate_that(True, 96), gate_that(False, 96)]
    fitted = FittedGates(CONCEPTS, edits, {"x": "no gate"}, 1.0)
    prompt_sets = [*make_prompt_sets(CONCEPTS, 10, tiny.tokenizers[0]), *read_captions([path])]
    report = evaluate_gates(tiny, fitted, prompt_sets, 3.0)
    counts = report.summary["counts"]
    assert counts["captions.txt"]["false_alarms"][:2] == [2, 3]  # of Monet's, for what does not say Monet
    assert counts["captions.txt"]["misses"][:2] == [1, 2]  # of Nike's
    assert counts["everyday captions"]["false_alarms"][:2] == [10, 10]
    assert counts["everyday captions"]["misses"] == [0, 0, 0.0, 1.0]  # which says nothing, of none
    held_out = next(each for each in prompt_sets if each.name == HELD_OUT)
    assert counts[HELD_OUT]["misses"][:2] == [held_out.owners.count(1), len(held_out.prompts)]
    assert counts[HELD_OUT]["false_alarms"][:2] == [held_out.owners.count(1), len(held_out.prompts)]
    assert list(report.concepts["concept"]) == ["x", "Monet", "Nike"] and report.summary["refused"] == {"x": "no gate"}
    monet, nike = report.concepts.iloc[1], report.concepts.iloc[2]
    assert monet.misses == 0 and nike.misses == nike.held_out and nike.false_alarms == nike.other_names == 0
    assert report.concepts.to_csv(index=False).splitlines()[1].startswith("x,,,") and isinstance(monet.misses, int)
    assert monet.bytes == 96 + 4 + 4 and monet.least_margin == 1
    assert [row["differ"][0] for row in report.summary["decisions"]] == [0, 0, 0]
    assert set(report.misses.concept) == {"Nike"} and set(report.false_alarms.concept) == {"Monet"}
    assert report.false_alarms.prompts.iloc[-1] in (HELD_OUT, TEMPLATES, MISSPELT, RESPELT)


def test_restored_concepts_are_said_by_all_templates_and_in_captions_and_by_no_other_set():
    tokenizer = BertTokenizer.from_pretrained(REPO_ROOT / "models" / "mini-sd-minilm" / "tokenizer")
    found = {each.name: each for each in make_prompt_sets(CONCEPTS[:1], 10, tokenizer, CONCEPTS[1:])}
    kind, prompts = load_template_set("brand"), set(found[RESTORED].prompts)
    assert all(says(prompt, ["Nike"]) for prompt in prompts) and not found[RESTORED].owners
    for template in (*kind.templates, *kind.held_out_templates):
        assert fill(template, "Nike") in prompts
    captions = [caption.rstrip(".?") for caption in everyday_captions(40, 1)]
    composed = [prompt for prompt in prompts if any(caption in prompt for caption in captions)]
    assert len(composed) >= 30  # of 40, the others are longer than what the tokenizer reads
    assert not any(
        says(prompt, ["Nike"]) for each in found.values() if each.name != RESTORED for prompt in each.prompts
    )
    assert RESTORED not in [each.name for each in make_prompt_sets(CONCEPTS, 10, tokenizer)]


def test_last_names_that_two_concepts_share_are_said_alone(tiny):
    couple = [Concept(k, name, name, kind="person") for k, name in enumerate(["Marie Curie", "Pierre Curie"])]
    found = {each.name: each for each in make_prompt_sets(couple[:1], 10, tiny.tokenizers[0], couple[1:])}
    prompts = found[SHARED].prompts
    assert prompts[0] == "Curie" and len(prompts) > 5 and all(says(prompt, ["Curie"]) for prompt in prompts)
    assert not any(says(prompt, concept.spellings) for prompt in prompts for concept in couple)
    assert SHARED not in [each.name for each in make_prompt_sets(CONCEPTS, 10, tiny.tokenizers[0])]


@pytest.mark.parametrize("fires", [True, False])
def test_a_restored_concept_keeps_every_bit_unless_a_gate_of_another_fires(tiny, monkeypatch, fires):
    monkeypatch.setattr(gates, "_NUM_TIMED", 1)
    rows = torch.randn(4, 96, generator=torch.Generator().manual_seed(0))
    edit = replace(gate_that(fires, 96), maps={"tokens": fit_map(rows, -rows, 0.1, 2)})
    prompt_sets = make_prompt_sets(CONCEPTS[:1], 10, tiny.tokenizers[0], CONCEPTS[1:])
    report = evaluate_gates(tiny, FittedGates(CONCEPTS[:1], [edit], {}, 1.0), prompt_sets, 3.0)
    total = len(next(each for each in prompt_sets if each.name == RESTORED).prompts)
    counts = report.summary["counts"][RESTORED]
    assert counts["false_alarms"][:2] == [total * fires, total] and counts["kept"][:2] == [total * (not fires), total]
    table = report.counts.set_index("prompts")
    assert (
        table.loc[RESTORED, "kept"].startswith(f"{total * (not fires)} of {total} ")
        and table.loc[HELD_OUT, "kept"] == ""
    )


def test_margins_of_all_gates_at_once_are_those_of_each(tiny):
    generator, edits = torch.Generator().manual_seed(0), []
    for number in (1, 3):
        gate = Gate(torch.randn(number, 96, generator=generator), torch.randn(number, generator=generator))
        edits.append(GatedEdit({"text_encoder": gate}, {"text_encoder": LAST_STATE}, {}))
    states = tiny.encode_with_states(["a dog", "a lake by Monet"], {"text_encoder": [LAST_STATE]})[1]
    alone = torch.stack([edit.margins(states) for edit in edits], dim=1)
    torch.testing.assert_close(FittedGates(CONCEPTS, edits, {}, 1.0).together.margins(states), alone)


def test_rounding_states_can_change_a_decision(tiny, monkeypatch):
    """The threshold lies between what a prompt's highest row scores, and what it scores in bfloat16."""
    states = tiny.encode_with_states(["a dog"], {"text_encoder": [LAST_STATE]})[1]["text_encoder", LAST_STATE]
    weights = torch.randn(1, 96, generator=torch.Generator().manual_seed(0))
    exact, rounded = (float((rows.float() @ weights.T).amax()) for rows in (states, states.bfloat16()))
    assert exact != rounded
    gate = Gate(weights, torch.tensor([(exact + rounded) / 2]))
    fitted = FittedGates(CONCEPTS[:1], [GatedEdit({"text_encoder": gate}, {"text_encoder": LAST_STATE}, {})], {}, 1.0)
    decisions = gates.decide(tiny, fitted, ["a dog"], at_once=64)
    assert (decisions.margins > 0).item() != (decisions.rounded["bfloat16"] > 0).item()


def test_concepts_without_a_gate_are_kept_with_the_reason():
    class Fitter(GateFitter):
        def __init__(self):
            pass

        def fit_all(self, concepts):
            for concept in concepts:
                yield ValueError("no gate tells it") if concept.name == "Nike" else gate_that(True, 4)

    fitted = fit_gates(Fitter(), CONCEPTS)
    assert [concept.name for concept in fitted.concepts] == ["Monet"] and len(fitted.edits) == 1
    assert fitted.refused == {"Nike": "no gate tells it"}
    with pytest.raises(ValueError, match="none of the 1 concepts has a gate: no gate tells it"):
        fit_gates(Fitter(), CONCEPTS[1:])


def test_rates_are_told_with_their_interval():
    assert format_rate([1, 50, 0.00354, 0.105]) == "1 of 50 (0.35 to 10.50 %)"
    assert format_rate([0, 0, 0.0, 1.0]) == ""


@pytest.mark.slow
def test_the_script_measures_a_list(script, tiny_path, tmp_path):
    path = tmp_path / "list.csv"
    path.write_text(HEADER + "Monet,artist,\nNike,brand,\nKeith Haring,artist,Haring\n")
    sizes = ["--retain_captions", 40, "--retain_words", 20, "--compositions", 2, "--misspellings", 2]
    arguments = ["--model", tiny_path, "--concepts", path, "--num_captions", 50, "--save_path", tmp_path / "out"]
    restored = ["--restored", "haring", "--device", "cpu"]
    code, out, err = script("eval-scripts/evaluate-gates.py", *arguments, *sizes, *restored)
    assert code == 0, err
    assert (
        "| everyday captions |" in out
        and "| restored concepts |" in out
        and "gates.csv, detectors.csv, false_alarms.csv, misses.csv and gates.json" in out
    )
    table = pd.read_csv(tmp_path / "out" / "gates.csv")
    assert sorted(table.concept) == ["Monet", "Nike"]
    summary = json.loads((tmp_path / "out" / "gates.json").read_text())
    assert summary["gates"] + len(summary["refused"]) == 2
