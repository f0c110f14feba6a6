"""The effect of shifts on the prompts that say their concepts: when a concept may be called erased."""

import math
from dataclasses import replace

import pytest
import torch

from ldm.config.concepts import always_protected_prompts, erasable_concepts, get_concept
from ldm.config.methods import GateConfig, SRSMEConfig
from ldm.diffusion.text_layers import text_layers
from ldm.diffusion.tokenizer import align_tokens
from ldm.erasure.effect import (
    LEAST_CHANGE,
    LEAST_EFFECT,
    LEAST_PROMPT_EFFECT,
    Effect,
    anchor_change,
    describe_miss,
    effect_prompts,
    judge,
    judged_form,
    least_effect_met,
    measure_effect,
)
from ldm.erasure.embedding_map import EmbeddingMap
from ldm.erasure.gate_fitter import GateFitter
from ldm.erasure.initial_shift import initial_shift
from ldm.erasure.null_space import NullSpaceBasis
from ldm.erasure.retain import RetainSet
from ldm.erasure.shift import DenseShift, SeparableShift

VANGOGH = get_concept("style", 1)
NEUTRAL = SRSMEConfig(mode="closed_form", init="closed_form", anchor="neutral", target_templates=6, basis_scale=1.0)


def closed_form_shift(model, config: SRSMEConfig, protected: list[str]) -> SeparableShift:
    """Return the closed form of VanGogh."""
    embeds = list(model.embed_prompts(protected).values())
    basis = NullSpaceBasis.fit(embeds, protected)
    return initial_shift(model, VANGOGH, config, basis, RetainSet(model, erasable_concepts("style")))


def test_prompts_are_the_name_first_then_fitted_and_held_out_ones_with_their_anchors(tiny):
    anchors = effect_prompts(VANGOGH, NEUTRAL, tiny.tokenizers[0])
    assert next(iter(anchors)) == "VanGogh" and anchors["VanGogh"] == "an artist"
    assert anchors["a painting by VanGogh"] == "a painting by an artist"
    assert anchors["a landscape by VanGogh"] == "a landscape by an artist"
    assert len(anchors) == 8 and all("VanGogh" in prompt for prompt in anchors)
    of_kind = effect_prompts(VANGOGH, NEUTRAL.with_changes(template_set="kind"), tiny.tokenizers[0])
    assert len(of_kind) > 8 and not any("Vincent" in prompt for prompt in of_kind)


def test_a_concept_without_templates_of_its_own_has_its_name(tiny):
    concept = replace(VANGOGH, templates=(), held_out_templates=())
    assert list(effect_prompts(concept, NEUTRAL, tiny.tokenizers[0])) == ["VanGogh"]


def test_no_shift_has_no_effect_and_the_whole_way_has_one(tiny):
    anchors = effect_prompts(VANGOGH, NEUTRAL, tiny.tokenizers[0])
    layers = text_layers(tiny.denoiser)
    zero = SeparableShift.zeros(layers, torch.eye(3, tiny.context_dim), 1.0)
    effect = measure_effect(tiny, VANGOGH, zero, NEUTRAL)
    assert list(effect.on_prompts) == list(anchors) and set(effect.on_prompts.values()) == {0.0}
    assert effect.is_erased is False
    full = closed_form_shift(tiny, NEUTRAL.with_changes(ridge_weight=1e-9), always_protected_prompts())
    effect = measure_effect(tiny, VANGOGH, full, NEUTRAL)
    assert effect.mean > 0.75 and effect.least > 0.5 and effect.is_erased


def test_the_effect_is_proportional_to_the_shift(tiny):
    shift = closed_form_shift(tiny, NEUTRAL, [""])
    half = SeparableShift(shift.coefficients, shift.directions, shift.scale / 2)
    whole, halved = (measure_effect(tiny, VANGOGH, each, NEUTRAL) for each in (shift, half))
    for prompt, value in whole.on_prompts.items():
        assert halved.on_prompts[prompt] == pytest.approx(value / 2, rel=1e-6)


def test_a_huge_ridge_and_a_protected_name_do_not_erase(tiny):
    weak = closed_form_shift(tiny, NEUTRAL.with_changes(ridge_weight=1e6), always_protected_prompts())
    effect = measure_effect(tiny, VANGOGH, weak, NEUTRAL)
    assert effect.mean < 1e-3 and effect.is_erased is False
    contradictory = closed_form_shift(tiny, NEUTRAL.with_changes(ridge_weight=1e-9), ["", "VanGogh"])
    effect = measure_effect(tiny, VANGOGH, contradictory, NEUTRAL)
    assert effect.least == pytest.approx(0, abs=1e-5) and effect.lowest_prompt == "VanGogh"
    assert effect.is_erased is False


def test_the_shift_of_another_concept_does_not_erase_this_one(tiny):
    shift = closed_form_shift(tiny, NEUTRAL, [""])
    church = get_concept("object", 1)
    assert measure_effect(tiny, church, shift, NEUTRAL).is_erased is False


def test_what_changes_other_layers_is_not_judged(tiny):
    name = next(name for name, _ in tiny.denoiser.named_parameters() if name.endswith("to_q.weight"))
    shift = DenseShift({name: torch.ones_like(tiny.denoiser.get_parameter(name))})
    effect = measure_effect(tiny, VANGOGH, shift, NEUTRAL)
    assert math.isnan(effect.mean) and effect.is_erased is None


def test_a_dense_shift_has_the_effect_of_the_separable_one(tiny):
    shift = closed_form_shift(tiny, NEUTRAL, [""])
    dense = DenseShift({name: shift.delta_weight(name) for name in shift.parameter_names})
    expected = measure_effect(tiny, VANGOGH, shift, NEUTRAL).on_prompts
    assert measure_effect(tiny, VANGOGH, dense, NEUTRAL).on_prompts == pytest.approx(expected)


def test_of_a_gated_shift_the_map_counts_where_the_gate_fires(tiny):
    shift = SeparableShift.zeros(text_layers(tiny.denoiser), torch.eye(3, tiny.context_dim), 1.0)
    config = GateConfig(
        retain_captions=20,
        retain_words=10,
        compositions=5,
        word_lists=0,
        misspellings=0,
        map_ridge=1e-6,
        max_map_rank=64,
    )
    shift.gated = GateFitter(tiny, [VANGOGH, get_concept("style", 2)], [""], config).fit(VANGOGH)
    assert measure_effect(tiny, VANGOGH, shift, NEUTRAL).mean == 0
    assert measure_effect(tiny, VANGOGH, shift, NEUTRAL, "gated").is_erased
    gates = {name: replace(gate, thresholds=gate.thresholds + 10) for name, gate in shift.gated.gates.items()}
    silent = replace(shift.gated, gates=gates)
    maps: dict[str, EmbeddingMap] = {}
    for stream, found in shift.gated.maps.items():
        maps[stream] = replace(found, outputs=0.3 * found.outputs)
    for edit in (silent, replace(shift.gated, maps=maps)):
        shift.gated = edit
        assert measure_effect(tiny, VANGOGH, shift, NEUTRAL, "gated").is_erased is False
    shift.gated = silent
    assert measure_effect(tiny, VANGOGH, shift, NEUTRAL, "gated").mean == 0


@pytest.mark.parametrize(
    "metadata",
    [
        {"effects": {"linear": {"mean": 0.6, "least": 0.5, "lowest_prompt": "x"}}},
        {"effects": {"linear": {"mean": 0.6, "least": 0.1, "lowest_prompt": "x"}}},
        {"effects": {"linear": {"mean": 0.6, "least": 0.5, "lowest_prompt": "x", "towards": "anchor"}}},
        {"effects": {"linear": {"mean": -0.1, "least": -0.3, "lowest_prompt": "x"}}},
        {"target_change": 0.02, "prompt": "x"},
        {"target_change": 0.2, "anchor_change": 1.0, "prompt": "x"},
        {"effects": {"gated": {"mean": 0.55, "least": 0.5, "lowest_prompt": "x"}}},
    ],
)
def test_the_least_effect_that_is_met_is_where_the_verdict_changes(metadata):
    form = "gated" if "gated" in metadata.get("effects", {}) else "linear"
    met = least_effect_met(metadata, form)
    assert judge(metadata, form, met - 1e-6)[0] is not False
    assert judge(metadata, form, met + 1e-6)[0] is False
    assert least_effect_met({}, form) == math.inf


def test_the_form_in_which_a_shift_was_judged_is_that_with_the_effect_that_a_ledger_says():
    said = {"least": 0.5, "lowest_prompt": "x"}
    metadata = {"effects": {"linear": {"mean": 0.23, **said}, "gated": {"mean": 0.61, **said}}}
    assert judged_form(metadata, 0.23) == "linear" and judged_form(metadata, 0.61) == "gated"
    assert judged_form(metadata, None) == judged_form({}, 0.5) == "gated"


@pytest.mark.parametrize(
    "effects",
    [
        3,
        {"linear": 3},
        {"linear": {"mean": 0.9, "least": None, "lowest_prompt": "x"}},
        {"linear": {"mean": True, "least": 0.9, "lowest_prompt": "x"}},
        {"gated": {"mean": 0.9, "least": math.nan, "lowest_prompt": "x"}},
        {"linear": {"mean": 0.9, "least": 0.9, "lowest_prompt": ["x"]}},
    ],
)
def test_an_effect_that_no_program_wrote_is_refused(effects):
    with pytest.raises(ValueError, match="the shift of Picasso says no effect that it could have"):
        judge({"concept": "Picasso", "effects": effects}, "linear")


@pytest.mark.parametrize(("change", "whole"), [(math.nan, 1.0), (0.1, 0.0), (0.1, math.inf), ("0.1", 1.0), (0.1, -1.0)])
def test_changes_that_are_no_numbers_are_not_judged(change, whole):
    assert judge({"target_change": change, "anchor_change": whole}, "linear") == (None, {})


def test_what_a_trained_shift_changes_is_judged_relative_to_the_way_to_a_neutral_word(tiny):
    whole = anchor_change(tiny, VANGOGH)
    embeds = tiny.embed_prompts(["VanGogh", "an artist"])
    [rows] = align_tokens(tiny.tokenizers[0], ["VanGogh"], ["an artist"])
    way, before = 0.0, 0.0
    for layer in text_layers(tiny.denoiser).values():
        way += (layer(embeds["an artist"][rows]) - layer(embeds["VanGogh"])).square().sum().item()
        before += layer(embeds["VanGogh"]).square().sum().item()
    assert whole == pytest.approx(math.sqrt(way / before), rel=1e-4)
    for part, expected in ((0.9 * LEAST_CHANGE, False), (1.1 * LEAST_CHANGE, None)):
        assert judge({"target_change": part * whole, "anchor_change": whole}, "linear")[0] is expected


def test_a_gate_erases_with_less_of_the_way():
    said = {"mean": 0.65, "least": 0.5, "lowest_prompt": "x"}
    assert judge({"effects": {"linear": said}}, "gated")[0] is False  # without a gate
    assert judge({"effects": {"linear": said, "gated": said}}, "linear")[0] is False
    assert judge({"effects": {"linear": said, "gated": said}}, "gated")[0] is True


def test_what_misses_a_limit_is_never_written_as_the_limit():
    said = {"mean": 0.6999, "least": 0.9, "lowest_prompt": "x", "limit": 0.7, "least_limit": 0.38}
    assert describe_miss(said) == "0.69 of 0.70 on average"
    low = describe_miss({**said, "least": 0.2})
    assert low == "0.69 of 0.70 on average and 0.20 of 0.38 on the lowest prompts, such as 'x'"
    assert describe_miss({**said, "mean": 0.8, "least": 0.2}) == "0.20 of 0.38 on the lowest prompts, such as 'x'"


def test_one_low_prompt_of_many_is_spared_but_never_the_name():
    high = {f"p{number}": 0.9 for number in range(7)}
    assert Effect({"name": 0.9, **high, "p0": 0.0}).is_erased
    assert not Effect({"name": 0.9, **high, "p0": 0.0, "p1": 0.0}).is_erased
    assert not Effect({"name": 0.9 * LEAST_PROMPT_EFFECT, **high}).is_erased
    assert not Effect({"name": 0.9 * LEAST_EFFECT, **dict.fromkeys(high, 0.9 * LEAST_EFFECT)}).is_erased
    assert Effect({"name": LEAST_EFFECT}).is_erased
