"""Gates of a part of the thousand names on the bundled model with a real text encoder, and restored namesakes."""

import pytest
from conftest import CPU

from ldm.config.concept_lists import read_concepts, split_restored
from ldm.config.concepts import Concept
from ldm.config.models import load_model_config
from ldm.diffusion.load import load_model
from ldm.erasure.gate_fitter import GateFitter
from ldm.experiments import gates, prompt_sets
from ldm.experiments.gates import evaluate_gates, fit_gates
from ldm.experiments.prompt_sets import CAPTIONS, HELD_OUT, RESTORED, SHARED, make_prompt_sets
from ldm.io.paths import REPO_ROOT

pytestmark = pytest.mark.slow
NAMESAKES = ["Michelle Obama", "Hillary Clinton", "Serena Williams"]  # whose surname an erased concept has too
ERASED_NAMESAKES = ["Barack Obama", "Bill Clinton", "Robin Williams"]
RESTORED_NAMES = [*NAMESAKES, "Albert Einstein", "Lego", "Pikachu"]


def some_names(num: int) -> list[Concept]:
    """Return so many of the thousand names, evenly spaced but for those that the test is about."""
    every_concept = read_concepts([str(REPO_ROOT / "data" / "thousand_names.csv")])
    named = [concept for concept in every_concept if concept.name in (*RESTORED_NAMES, *ERASED_NAMESAKES)]
    others = [concept for concept in every_concept if concept not in named]
    step = len(others) // (num - len(named))
    return [*named, *others[::step][: num - len(named)]]


def test_restored_namesakes_keep_every_bit_while_18_of_24_names_are_erased(monkeypatch):
    monkeypatch.setattr(gates, "_NUM_TIMED", 1)
    monkeypatch.setattr(gates, "_NUM_ALONE", 1)
    monkeypatch.setattr(prompt_sets, "_NUM_MISSPELT", 1)
    model = load_model(REPO_ROOT / "models" / "mini-sd-minilm", CPU)
    concepts = some_names(24)
    erased, restored = split_restored(concepts, RESTORED_NAMES)
    assert len(erased) == 18 and len(restored) == 6
    found = fit_gates(GateFitter(model, concepts, [], load_model_config(model).gate), erased)
    assert len(found.edits) >= 17, found.refused
    made = make_prompt_sets(found.concepts, 500, model.tokenizers[0], restored)
    counts = evaluate_gates(model, found, made, 0.0).summary["counts"]
    alarms, total = counts[CAPTIONS]["false_alarms"][:2]
    assert total == 500 and alarms <= 15
    misses, said = counts[HELD_OUT]["misses"][:2]
    assert said > 100 and misses <= 0.02 * said
    assert counts[SHARED]["false_alarms"][0] <= 1
    kept, prompts = counts[RESTORED]["kept"][:2]
    assert kept == prompts > 300 and counts[RESTORED]["false_alarms"][0] == 0
