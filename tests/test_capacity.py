"""Capacity counts what is left for further concepts, and the leakage that the concepts' shifts really have."""

import pytest
import torch
from conftest import is_error, styles

from ldm.config.concepts import Concept, watermark_prompts
from ldm.config.everyday import everyday_captions
from ldm.config.methods import NullSpaceConfig, SRSMEConfig
from ldm.diffusion.text_layers import text_layers
from ldm.erasure.capacity import FurtherPrompts, measure_capacity, summarize_groups
from ldm.erasure.closed_form import Costs, closed_form_map, erasure_space
from ldm.erasure.gate import Gate
from ldm.erasure.gated_edit import GatedEdit
from ldm.erasure.initial_shift import separable_shift
from ldm.erasure.leakage import leakage
from ldm.erasure.null_space import NullSpaceBasis
from ldm.erasure.protection import ProtectedRows
from ldm.experiments.gate_capacity import measure_gate_capacity
from ldm.experiments.gates import FittedGates

CONFIG = SRSMEConfig(
    target_templates=1, max_directions=None, ridge_weight=0.1, preserve_scale=2.0, vocab_preserve_scale=0.5
)
CONCEPTS = styles(0, 1, 2)


def test_capacity_counts_free_dimensions_and_the_leakage_that_shifts_have(tiny):
    report = measure_capacity(tiny, CONCEPTS, NullSpaceConfig(), [1e-7, 1e-2], CONFIG)
    prompts = ["", *watermark_prompts(), *(concept.prompt for concept in CONCEPTS)]
    rows = tiny.encode_prompt(prompts).flatten(0, 1).double()
    values = torch.linalg.svdvals(rows) / torch.linalg.matrix_norm(rows, ord=2)
    width = tiny.context_dim
    padded = torch.nn.functional.pad(values, (0, max(0, width - len(rows))))[:width]
    assert torch.allclose(report.singular_values, padded, atol=1e-7)
    exact, coarse = report.table.itertuples()
    assert exact.rank + exact.nullity == width == coarse.rank + coarse.nullity and exact.rank > coarse.rank
    assert exact.remaining_concepts == int(exact.nullity / exact.directions) < coarse.remaining_concepts
    assert exact.min_projection < coarse.min_projection
    assert exact.max_leakage_protected < 1e-6 < coarse.max_leakage_protected

    layers, embeds = text_layers(tiny.denoiser), tiny.embed_prompts(prompts)
    shifts = []
    for concept in CONCEPTS:
        protected = [prompt for prompt in prompts if prompt != concept.prompt]
        basis = NullSpaceBasis.fit(tiny.encode_prompt(protected), protected, 1e-2, "svd")
        targets = tiny.encode_prompt([concept.prompt, concept.captions[0]])
        gram = 0.5 * 2 * tiny.vocab_gram_without(concept.name, *concept.aliases)
        space = erasure_space(basis.vectors, basis.protected, targets, Costs(0.1, 2.0, gram))
        embedding_map = closed_form_map(space, targets, tiny.encode_uncond())
        shifts.append(separable_shift(layers, space.directions, 1.0, embedding_map))
    # The two others' shifts together change the outputs for Cezanne's prompt: by the sum of what each adds.
    cezanne, changed, base = embeds["Cezanne"].double(), 0.0, 0.0
    for name, layer in layers.items():
        changed += (cezanne @ sum(shift.delta_weight(f"{name}.weight") for shift in shifts[1:]).T).square().sum()
        base += (cezanne @ layer.weight.double().T).square().sum()
    reported = report.leakage.set_index(["tolerance", "prompt"]).leakage
    assert reported[1e-2, "Cezanne"] == pytest.approx(float((changed / base).sqrt()), rel=1e-3)
    assert leakage(layers, {"": shifts[1]}, {"Cezanne": embeds["Cezanne"]})[0]["leakage"] > 0


def test_capacity_protects_what_an_erasure_protects(tiny, monkeypatch):
    """The rows are those of `protection.ProtectedRows`, of which `solve_null_spaces` is made too."""
    made = []

    class Recorded(ProtectedRows):
        def __init__(self, embeds, fixed, prompts, weight):
            super().__init__(embeds, fixed, prompts, weight)
            made.append((list(fixed), dict(prompts), weight))

    monkeypatch.setattr("ldm.erasure.capacity.ProtectedRows", Recorded)
    null_space_config = NullSpaceConfig(protected_templates=1, always_protected_weight=3.0)
    report = measure_capacity(tiny, CONCEPTS, null_space_config, [1e-2], CONFIG)
    protected = {concept.label: [concept.prompt, concept.captions[0]] for concept in CONCEPTS}
    assert made == [(["", *watermark_prompts()], protected, 3.0)]
    held_out = set(report.leakage[report.leakage.held_out].prompt)
    assert held_out == {f"a landscape by {concept.prompt}" for concept in CONCEPTS}
    assert list(report.leakage) == ["tolerance", "prompt", "held_out", "leakage", "group"]
    assert set(report.leakage.group) == {"protected", "held_out"}


def test_capacity_reports_on_groups_that_nothing_protects(tiny):
    alone = measure_capacity(tiny, CONCEPTS, NullSpaceConfig(), [1e-7, 1e-2], CONFIG)
    groups = {
        "kin": ["art by Klee", "Goya"],
        "near_misses": ["Cezanne street"],
        "compositions": ["a church by Cezanne"],
    }
    further = FurtherPrompts((), groups)
    report = measure_capacity(tiny, CONCEPTS, NullSpaceConfig(), [1e-7, 1e-2], CONFIG, further)
    assert report.table.equals(alone.table)  # they change nothing of it
    own_groups = report.leakage.group.isin(("protected", "held_out"))
    assert report.leakage[own_groups].reset_index(drop=True).equals(alone.leakage)
    rows = report.leakage.set_index(["tolerance", "prompt"]).leakage
    assert rows[1e-2, "Goya"] > 0 and rows[1e-2, "a church by Cezanne"] > 0
    single = measure_capacity(tiny, CONCEPTS[:1], NullSpaceConfig(), [1e-2], CONFIG, further).leakage
    found = single.set_index("prompt").leakage
    assert found["a church by Cezanne"] == 0 < found["Goya"]  # without its own concept's shift
    assert found["Cezanne street"] > 0
    summary = summarize_groups(report.leakage).set_index("group")
    assert summary.prompts.to_dict() == {"protected": 6, "held_out": 3, "kin": 2, "near_misses": 1, "compositions": 1}
    assert list(summary) == ["prompts", "median / max leakage at 1e-07", "median / max leakage at 0.01"]
    median, largest = map(float, summary["median / max leakage at 0.01"]["kin"].split(" / "))
    assert median == pytest.approx((rows[1e-2, "Goya"] + rows[1e-2, "art by Klee"]) / 2, rel=0.1) and largest >= median


def test_where_the_others_say_all_of_a_concept_no_further_one_fits(tiny):
    everything = FurtherPrompts(everyday_captions(30))  # which fill all dimensions
    report = measure_capacity(tiny, CONCEPTS, NullSpaceConfig(), [1e-7, 0.2], CONFIG, everything)
    full, coarse = report.table.itertuples()
    assert full.nullity <= 1 and (full.remaining_concepts, full.min_projection) == (0, 0.0)
    assert coarse.directions == 0 and coarse.remaining_concepts is None and coarse.min_projection > 0
    same = FurtherPrompts([CONCEPTS[0].captions[0], CONCEPTS[0].prompt])
    report = measure_capacity(tiny, CONCEPTS[:1], NullSpaceConfig(), [1e-7], CONFIG, same)
    assert report.table["nullity"][0] > 0 and report.table["min_projection"][0] == 0


class Gated:
    """Gates of which each fires for the captions that have its letter in them, and an encoder that they read."""

    def __init__(self, *letters: str):
        self.letters = letters

    def fitted(self) -> FittedGates:
        concepts = [Concept(number, name, name) for number, name in enumerate(("heron", "kite", "owl", "gull"))]
        edits = [self._edit(number) for number in range(len(self.letters))]
        return FittedGates(concepts[: len(edits)], edits, {"Pepsi": "no gate tells it"}, [0.0] * len(edits))

    def _edit(self, number: int) -> GatedEdit:
        weights = torch.zeros(1, len(self.letters))
        weights[0, number] = 1.0
        return GatedEdit({"": Gate(weights, torch.tensor([0.5]), 0.1 * (number + 1))}, {"": -1}, {})

    def encode_with_states(self, prompts, layers):
        rows = [[[float(letter in prompt) for letter in self.letters]] for prompt in prompts]
        return torch.zeros(len(prompts), 1, 1), {("", -1): torch.tensor(rows)}


def test_gates_fit_until_their_false_alarms_together_are_too_many():
    captions = [f"x{number}" for number in range(96)] + ["xq", "xq", "xz", "a heron in q"]  # which says the first
    model = Gated("q", "z")
    found = measure_gate_capacity(model, model.fitted(), captions, [0.01, 0.06])
    assert found.gates["false_alarms"].tolist() == [2, 1] and found.gates["captions"].tolist() == [99, 100]
    assert found.gates["gap"].tolist() == [0.1, 0.2] and (found.gates["high"] > found.gates["low"]).all()
    mean = (2 / 99 + 1 / 100) / 2
    assert found.table["remaining_concepts"].tolist() == [0, int(0.06 / mean) - 2]
    assert 0 <= found.table["at_least"][1] < found.table["remaining_concepts"][1]
    assert found.table["smallest_gap"].tolist() == [0.1, 0.1] and set(found.table["without"]) == {1}
    assert found.table["tripped"][0].startswith("3 of 100 (")  # once each, however many gates fire


def test_gates_without_a_false_alarm_set_no_limit_but_that_of_their_interval():
    few, many = (["x"] * number for number in (100, 1000))
    model = Gated("q")
    tables = [measure_gate_capacity(model, model.fitted(), captions).table for captions in (few, many)]
    for table in tables:
        assert table["limit"].tolist() == [0.01, 0.03] and table["remaining_concepts"].isna().all()
    assert tables[0]["at_least"].tolist() == [0, 0]  # of a hundred captions up to 3.7 % may trip it
    assert tables[1]["at_least"].tolist() == [int(0.01 / 0.00383) - 1, int(0.03 / 0.00383) - 1]


def test_gates_that_differ_bound_less_than_gates_that_are_alike():
    captions = ["x"] * 900 + ["xq"] * 20 + ["xz"] * 20 + ["xy"] * 20 + ["xv"] * 20 + ["x"] * 20
    alike = Gated("q", "z", "y", "v")
    unlike = Gated("q", "0", "1", "2")  # of which one has as many false alarms as all of the others
    unlike_captions = ["xq" if any(letter in text for letter in "qzyv") else text for text in captions]
    table = measure_gate_capacity(alike, alike.fitted(), captions, [0.3]).table
    other = measure_gate_capacity(unlike, unlike.fitted(), unlike_captions, [0.3]).table
    assert table["remaining_concepts"].tolist() == other["remaining_concepts"].tolist() == [11]
    assert table["at_least"][0] > other["at_least"][0]


@pytest.mark.slow
def test_the_script_fits_gates_where_shifts_act_by_them(script, tiny_path, tmp_path):
    arguments = ["eval-scripts/capacity.py", "--model", tiny_path, "--device", "cpu", "--save_path", tmp_path / "c"]
    arguments += ["--tolerances", "1e-3", "--num_captions", "20", "--unprotected_prompts", "0", "--form", "gated"]
    code, out, err = script(*arguments, "--concepts", "Greg Rutkowski", "a red fox")
    assert code == 0 and "| at_least |" in out and "gates.csv" in out, err
    assert (tmp_path / "c" / "gates.csv").read_text().startswith("concept,gap,false_alarms,captions,low,high")
    is_error(script(*arguments), "--concepts or of --erased_index")
    is_error(script(*arguments, "--concepts", "a red fox", "--erased_index", "2"), "give one of them")
    is_error(script(*arguments, "--erased_index", "2", "--kind", "style"), "--kind goes with --concepts")


@pytest.mark.slow
def test_the_script_ends_with_tables_and_a_plot(script, tiny_path, tmp_path):
    arguments = ["eval-scripts/capacity.py", "--model", tiny_path, "--device", "cpu", "--save_path", tmp_path / "c"]
    arguments += ["--erased_index", "Cezanne,VanGogh", "2", "--form", "linear"]
    code, out, _ = script(*arguments, "--tolerances", "1e-3,1e-7")
    assert code == 0 and "| 1e-07 |" in out and "a landscape by VanGogh" in out and "leakage at 0.001" in out
    assert "| near_misses | 10 |" in out and "| compositions | 10 |" in out
    assert {path.name for path in (tmp_path / "c").iterdir()} == {"capacity.csv", "capacity.png", "leakage.csv"}
    code, out, _ = script(*arguments, "--tolerances", "1e-3", "--unprotected_prompts", "0")
    assert code == 0 and "near_misses" not in out and "| protected |" in out
    assert "at_least" not in out  # the family of Stable Diffusion acts by gates, and this is asked for linear
    is_error(script(*arguments, "--tolerances", "2"), "between 0 and 1")
    is_error(script(*arguments, "--tolerances", "x"), "--tolerances x")
