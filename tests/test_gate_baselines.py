"""Plain detectors beside gates: which names stand in a text, what is rewritten, and what each detector counts."""

import pytest
import torch
from conftest import CPU

from ldm.config.concepts import Concept
from ldm.config.spellings import says
from ldm.diffusion.load import load_model
from ldm.erasure.embedding_map import fit_map
from ldm.erasure.gate import Gate
from ldm.erasure.gated_edit import LAST_STATE, GatedEdit
from ldm.experiments import gates
from ldm.experiments.baselines import GATES, KEYWORDS, REWRITING, compare_detectors, rewrite
from ldm.experiments.gates import FittedGates, evaluate_gates
from ldm.experiments.prompt_sets import (
    HELD_OUT,
    MISSPELT,
    NEAR_MISSES,
    RESPELT,
    find_names,
    make_prompt_sets,
    respellings,
)

MONET = Concept(0, "Monet", "Monet", ("Claude Monet",), kind="style")
CONCEPTS = [MONET, Concept(1, "Nike", "Nike", kind="brand")]


def test_a_keyword_is_a_whole_word_of_either_case():
    prompts = ["a lake by MONET", "monetary policy", "nike shoes by Claude Monet's heirs", "a dog"]
    assert find_names(prompts, CONCEPTS).tolist() == [[True, False], [False, False], [True, True], [False, False]]


def test_a_prompt_is_rewritten_with_the_neutral_word_wherever_it_says_the_name():
    assert rewrite("a lake by claude monet, Monet style", MONET) == "a lake by an artist, an artist style"
    assert rewrite("a lake by Monte", MONET) == "a lake by Monte"


def test_a_name_within_a_word_is_not_rewritten():
    assert rewrite("monetary policy by Monet", MONET) == "monetary policy by an artist"


def test_other_spellings_are_read_as_the_name_and_most_are_no_keyword():
    found = respellings("Claude Monet")
    assert "c l a u d e m o n e t" in found and "claudemonet" in found and "Claude-Monet's" in found
    assert "Claude Monet" not in found and len(set(found)) == len(found)
    named = [text for text in found if says(text, ["Claude Monet"])]
    assert set(named) == {"claude monet", "CLAUDE MONET", "Claude Monet\u2019s"}


@pytest.fixture(scope="module")
def detectors(tiny_path):
    """Return the table of gates that fire for every prompt (Monet's) and for none (Nike's)."""
    tiny = load_model(tiny_path, CPU)
    rows = torch.randn(4, 96, generator=torch.Generator().manual_seed(0))
    edits = []
    for threshold in (-1.0, 1.0):
        gate = Gate(torch.zeros(1, 96), torch.tensor([threshold]), gap=0.5)
        maps = {"tokens": fit_map(rows, -rows, 0.1, 2)}
        edits.append(GatedEdit({"text_encoder": gate}, {"text_encoder": LAST_STATE}, maps))
    fitted = FittedGates(CONCEPTS, edits, {}, 1.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gates, "_NUM_TIMED", 1)
        report = evaluate_gates(tiny, fitted, make_prompt_sets(CONCEPTS, 10, tiny.tokenizers[0]), 3.0)
        table = compare_detectors(tiny, fitted, report.judged)
    return table.set_index("detector"), {each.prompts.name: each for each in report.judged}


def test_a_gates_false_alarm_rewrites_nothing_where_no_name_stands(detectors):
    table, _ = detectors
    column = table["false alarms: everyday captions"]
    assert column[GATES].startswith("10 of 10") and column[REWRITING].startswith("0 of 10")
    assert column[KEYWORDS].startswith("0 of 10")


def test_a_filter_of_keywords_misses_no_name_and_nearly_all_that_are_misspelt(detectors):
    table, judged = detectors
    said = int(judged[HELD_OUT].said.sum())
    assert table[f"misses: {HELD_OUT}"][KEYWORDS].startswith(f"0 of {said} ")
    total = int(judged[MISSPELT].said.sum())
    assert table[f"misses: {MISSPELT}"][KEYWORDS].startswith(f"{total} of {total} ")
    assert table[f"misses: {MISSPELT}"][REWRITING] == table[f"misses: {MISSPELT}"][KEYWORDS]
    respelt = judged[RESPELT]
    missed = respelt.said & ~find_names(respelt.prompts.prompts, CONCEPTS)
    assert table[f"misses: {RESPELT}"][KEYWORDS].startswith(f"{int(missed.sum())} of ")


def test_a_near_miss_says_no_concept_though_it_may_have_the_word(detectors):
    _, judged = detectors
    assert not judged[NEAR_MISSES].said.any()


def test_only_the_map_works_without_a_text(detectors):
    table, _ = detectors
    assert dict(table["works on prompt_embeds"]) == {GATES: "yes", REWRITING: "no", KEYWORDS: "no"}
    assert (table["ms"] >= 0).all()
