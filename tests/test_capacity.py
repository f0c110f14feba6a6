"""Capacity counts what is left for further concepts, and the leakage that the concepts' shifts really have."""

import pytest
import torch
from conftest import is_error, styles

from ldm.config.concepts import watermark_prompts
from ldm.config.methods import NullSpaceConfig, SRSMEConfig
from ldm.diffusion.text_layers import text_layers
from ldm.erasure.capacity import FurtherPrompts, measure_capacity, summarize_groups
from ldm.erasure.closed_form import Costs, closed_form_map, erasure_space
from ldm.erasure.leakage import leakage
from ldm.erasure.null_space import NullSpaceBasis
from ldm.erasure.protection import ProtectedRows
from ldm.erasure.shift import SeparableShift

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

    layers, embeds = text_layers(tiny.unet), tiny.embed_prompts(prompts)
    shifts = []
    for concept in CONCEPTS:
        protected = [prompt for prompt in prompts if prompt != concept.prompt]
        basis = NullSpaceBasis.fit(tiny.encode_prompt(protected), protected, 1e-2, "svd")
        targets = tiny.encode_prompt([concept.prompt, concept.captions[0]])
        gram = 0.5 * 2 * tiny.vocab_gram_without(concept.name, *concept.aliases)
        space = erasure_space(basis.vectors, basis.protected, targets, Costs(0.1, 2.0, gram))
        embedding_map = closed_form_map(space, targets, tiny.encode_uncond())
        shifts.append(SeparableShift.from_map(layers, space.directions, 1.0, embedding_map))
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


@pytest.mark.slow
def test_the_script_ends_with_tables_and_a_plot(script, tiny_path, tmp_path):
    arguments = ["eval-scripts/capacity.py", "--model", tiny_path, "--device", "cpu", "--save_path", tmp_path / "c"]
    arguments += ["--erased_index", "Cezanne,VanGogh", "2"]
    code, out, _ = script(*arguments, "--tolerances", "1e-3,1e-7")
    assert code == 0 and "| 1e-07 |" in out and "a landscape by VanGogh" in out and "leakage at 0.001" in out
    assert "| near_misses | 10 |" in out and "| compositions | 10 |" in out
    assert {path.name for path in (tmp_path / "c").iterdir()} == {"capacity.csv", "capacity.png", "leakage.csv"}
    code, out, _ = script(*arguments, "--tolerances", "1e-3", "--unprotected_prompts", "0")
    assert code == 0 and "near_misses" not in out and "| protected |" in out
    is_error(script(*arguments, "--tolerances", "2"), "between 0 and 1")
    is_error(script(*arguments, "--tolerances", "x"), "--tolerances x")
