"""The leakage of all shifts together is that of the outputs themselves, and groups of prompts are summarized by it."""

import math
import warnings

import pytest
import torch
from torch import nn

from ldm.erasure.leakage import LARGE_LEAKAGE, joint_leakage, leakage_by_group, notify_of_leakage
from ldm.erasure.shift import DenseShift
from ldm.io.errors import Notice

WIDTH, TOKENS = 5, 3


@pytest.fixture
def layers():
    torch.manual_seed(0)
    return {"a": nn.Linear(WIDTH, 4, bias=False), "b": nn.Linear(WIDTH, 7, bias=False)}


@pytest.fixture
def embeds():
    generator = torch.Generator().manual_seed(1)
    return {prompt: torch.randn(TOKENS, WIDTH, generator=generator) for prompt in ("said", "kept")}


def changed_where_said(embeds):
    """Return the embeddings with those of one prompt mapped to another, as a gate does."""
    return {**embeds, "said": embeds["said"].flip(0)}


def outputs(layers, rows, shifts=()):
    """Return what all layers make of rows, with what shifts add to their weights, in one tensor."""
    parts = []
    for name, layer in layers.items():
        weight = layer.weight.detach().double() + sum(shift.delta_weight(f"{name}.weight").double() for shift in shifts)
        parts.append(rows.double() @ weight.T)
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize("num_linear", [0, 1, 2])
def test_the_joint_leakage_is_that_of_gates_and_weights_together(layers, embeds, num_linear):
    shifts = []
    for number in range(num_linear):
        torch.manual_seed(number + 5)
        shifts.append(DenseShift({f"{name}.weight": torch.randn(layer.weight.shape) for name, layer in layers.items()}))
    after = changed_where_said(embeds)
    found = joint_leakage(layers, shifts, embeds, after)
    for prompt, rows in embeds.items():
        base = outputs(layers, rows)
        changed = outputs(layers, after[prompt], shifts) - base
        assert found[prompt] == pytest.approx((changed.norm() / base.norm()).item(), rel=1e-6)


def test_a_prompt_that_trips_no_gate_has_no_leakage_at_all(layers, embeds):
    leakages = joint_leakage(layers, [], embeds, changed_where_said(embeds))
    assert leakages["kept"] == 0 < leakages["said"]
    table = leakage_by_group(leakages, {"one": ["said"], "both": ["said", "kept"]}).set_index("group")
    assert table.prompts.tolist() == [1, 2] and table.unchanged_outputs.tolist() == [0, 0.5]
    assert table.median_leakage["both"] == pytest.approx(leakages["said"] / 2)
    assert table.max_leakage.tolist() == [leakages["said"]] * 2


def test_what_other_layers_change_has_no_leakage_to_report(layers, embeds):
    elsewhere = DenseShift({"c.weight": torch.ones(2, 2)})
    leakages = joint_leakage(layers, [elsewhere], embeds, embeds)
    assert all(map(math.isnan, leakages.values()))
    table = leakage_by_group(leakages, {"both": ["said", "kept"]})
    assert table[["unchanged_outputs", "median_leakage", "max_leakage"]].isna().all(axis=None)


def test_a_large_leakage_is_said_and_a_small_one_is_not():
    small, large = {"a dog": 0.9 * LARGE_LEAKAGE, "": 0.0}, {"a dog": 0.2, "": 0.0}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        notify_of_leakage({"Picasso": small, "owl": {"": math.nan}})
    with pytest.warns(Notice, match=r"the shift of owl changes the protected prompt 'a dog' by 0\.2 .*`rank_rtol`"):
        notify_of_leakage({"Picasso": small, "owl": large})
    with pytest.warns(Notice, match=r"\(more than 0.05\), and 1 more shifts change one so: take"):
        notify_of_leakage({"Picasso": {"a cat": 0.1}, "owl": large})
