"""Gates: they fire on what says a concept and on nothing else, on small random embeddings."""

import pytest
import torch

from ldm.erasure import gate as gates
from ldm.erasure.gate import (
    Gate,
    GateTask,
    NoGateError,
    Positives,
    byte_scales,
    fit_gates,
    in_bytes,
    join_gates,
    without_needless,
)
from ldm.erasure.negatives import Negatives
from ldm.erasure.prompt_rows import PromptRows

WIDTH, TOKENS, RIDGE, POSITION = 16, 5, 0.01, 0.6
NONE = torch.zeros(0, TOKENS, WIDTH)  # no lookalikes


def random_rows(num: int, seed: int) -> torch.Tensor:
    return torch.randn(num, TOKENS, WIDTH, generator=torch.Generator().manual_seed(seed))


def saying(num: int, seed: int, axis: int = 0, strength: float = 8.0) -> torch.Tensor:
    """Return the rows of prompts whose token number 2 is far along one axis."""
    rows = random_rows(num, seed)
    rows[:, 2] *= 0.2
    rows[:, 2, axis] += strength
    return rows


def task(rows: torch.Tensor, negatives: torch.Tensor, lookalikes: torch.Tensor = NONE, **other) -> GateTask:
    left_out = other.get("left_out", torch.zeros(len(negatives), dtype=torch.bool))
    last_tokens = torch.full((len(rows),), 2)
    positives = Positives(PromptRows.whole(rows), last_tokens, other.get("clearance"))
    return GateTask([positives], left_out, PromptRows.whole(lookalikes))


def fit_gate(one: GateTask, negatives: Negatives, position: float) -> Gate:
    """Return the gate of the only group of a task. Raises NoGateError where it has none."""
    [[found]] = fit_gates([one], negatives, position)
    if isinstance(found, NoGateError):
        raise found
    return found


def fit(rows: torch.Tensor, negatives: torch.Tensor, lookalikes: torch.Tensor = NONE, **other) -> Gate:
    position = other.pop("position", POSITION)
    others = Negatives(PromptRows.whole(negatives), RIDGE)
    return fit_gate(task(rows, negatives, lookalikes, **other), others, position)


def scores(gate: Gate, rows: torch.Tensor) -> torch.Tensor:
    """Return the highest score of each prompt, of a gate of one direction."""
    return (rows @ gate.weights[0]).amax(1)


def test_a_gate_fires_on_all_that_say_the_concept_and_on_no_other():
    group, negatives = saying(12, 0), random_rows(200, 1)
    gate = fit(group, negatives)
    assert gate.weights.shape == (1, WIDTH) and gate.thresholds.shape == (1,) and gate.gap > 0
    assert (gate.margins(group) > 0).all() and (gate.margins(negatives) < 0).all()
    assert (gate.margins(saying(50, 2)) > 0).all() and (gate.margins(random_rows(50, 3)) < 0).all()


def test_one_row_is_enough_wherever_it_stands():
    group, negatives = saying(12, 0), random_rows(200, 1)
    gate = fit(group, negatives)
    moved = negatives[:TOKENS].clone()
    for position in range(TOKENS):
        moved[position, position] = group[0, 2]
    assert (gate.margins(moved) > 0).all()


@pytest.mark.parametrize("position", [0.1, 0.5, 0.9])
def test_the_threshold_lies_at_the_position_in_the_gap(position):
    group, negatives = saying(12, 0), random_rows(200, 1)
    gate = fit(group, negatives, position=position)
    lowest, highest = scores(gate, group).min(), scores(gate, negatives).max()
    assert gate.gap == pytest.approx(float(lowest - highest), abs=1e-5)
    assert float(gate.thresholds[0]) == pytest.approx(float(highest + position * (lowest - highest)), abs=1e-5)


def test_scores_are_in_units_of_the_distance_of_the_means():
    group, negatives = saying(12, 0), random_rows(200, 1)
    gate = fit(group, negatives)
    distance = group[:, 2].mean(0) - negatives.flatten(0, 1).mean(0)
    assert float(gate.weights[0] @ distance) == pytest.approx(1, abs=0.02)  # as bytes have it


def test_weights_are_whole_numbers_of_a_byte_times_a_power_of_two():
    weights = torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 6, 5)[:, None]
    scales, rounded = byte_scales(weights), in_bytes(weights)
    numbers = rounded / scales
    assert torch.equal(numbers, numbers.round()) and (numbers.abs().amax(1) >= 63).all() and numbers.abs().max() <= 127
    assert ((rounded - weights).abs() <= scales * 1.01).all() and (torch.frexp(scales).mantissa == 0.5).all()
    assert torch.equal(in_bytes(rounded), rounded) and torch.equal(byte_scales(rounded), scales)
    gate = fit(saying(12, 0), random_rows(200, 1))
    assert gate.weights.dtype == torch.float32 and torch.equal(in_bytes(gate.weights), gate.weights)


def test_prompts_that_are_left_out_do_not_count():
    group, negatives = saying(12, 0), random_rows(200, 1)
    own = group[:3]
    left_out = torch.tensor([False] * 200 + [True] * 3)
    with_own = fit(group, torch.cat([negatives, own]), left_out=left_out)
    without = fit(group, negatives)
    assert torch.allclose(with_own.weights, without.weights, atol=1e-3) and (with_own.margins(own) > 0).all()
    assert torch.allclose(with_own.thresholds, without.thresholds, atol=1e-3)
    with pytest.raises(NoGateError):
        fit(group, torch.cat([negatives, own]))


def test_a_direction_that_takes_namesakes_is_turned_until_it_tells_them_apart(monkeypatch):
    """Namesakes end in the same token: their rows are those of the concept but for a part along another axis."""
    group, namesakes = saying(12, 0), saying(4, 5)
    namesakes[:, 2, 3] += 0.8
    negatives = torch.cat([random_rows(300, 1), namesakes])
    gate = fit(group, negatives)
    assert gate.gap >= 0.05 and (gate.margins(group) > 0).all() and (gate.margins(negatives) < 0).all()
    others = saying(50, 7)
    others[:, 2, 3] += 0.8
    assert (gate.margins(saying(50, 6)) > 0).float().mean() > 0.9 > 0.5 > (gate.margins(others) > 0).float().mean()
    with torch.inference_mode():  # in which some programs run whole pipelines
        assert torch.equal(fit(group, negatives).weights, gate.weights)
    monkeypatch.setattr(gates, "_TURN_RIDGES", ())
    with pytest.raises(NoGateError):
        fit(group, negatives)


def test_a_direction_that_leaves_hardly_a_gap_is_turned_too(monkeypatch):
    group, namesakes = saying(12, 0), saying(4, 5)
    namesakes[:, 2, 3] += 5
    negatives = torch.cat([random_rows(300, 1), namesakes])
    turned = fit(group, negatives)
    monkeypatch.setattr(gates, "_TURN_RIDGES", ())
    straight = fit(group, negatives)
    assert 0 < straight.gap < 0.05 < 0.3 < turned.gap
    others = saying(50, 7)
    others[:, 2, 3] += 5
    assert (straight.margins(others) > 0).any() and not (turned.margins(others) > 0).any()
    assert (turned.margins(saying(50, 6)) > 0).float().mean() > 0.9


def test_the_direction_is_fishers_with_the_covariance_of_all_but_the_left_out(monkeypatch):
    monkeypatch.setattr(gates, "_HARD_WEIGHT", 0.0)
    monkeypatch.setattr(gates, "in_bytes", lambda weights: weights)
    group, negatives = saying(12, 0), random_rows(300, 1)
    left_out = torch.arange(300) % 3 == 0
    gate = fit(group, negatives, left_out=left_out)
    every, kept = (rows.flatten(0, 1).double() for rows in (negatives, negatives[~left_out]))
    ridge = RIDGE * every.T.cov(correction=0).diagonal().mean() * len(every) / len(kept) * torch.eye(WIDTH)
    own = group[:, 2].double()
    covariance = kept.T.cov(correction=0) + ridge + 0.1 * own.T.cov(correction=0)
    offset = own.mean(0) - kept.mean(0)
    direction = torch.linalg.solve(covariance, offset)
    assert torch.allclose(gate.weights[0].double(), direction / (direction @ offset), atol=1e-4)


def test_a_gate_does_not_depend_on_those_that_are_fitted_with_it():
    negatives = random_rows(300, 1)
    namesakes = saying(12, 3, axis=3)  # of the fourth, whose direction is turned
    namesakes[:, 2, 5] += 0.8
    negatives[-12:] = namesakes
    others = Negatives(PromptRows.whole(negatives), RIDGE)
    tasks = [task(saying(12, seed, axis=seed), negatives, random_rows(4, seed + 20)) for seed in range(6)]
    [[straight]] = fit_gates(tasks[3:4], others, POSITION, turns=False)
    assert isinstance(straight, NoGateError)
    together = fit_gates(tasks, others, POSITION)
    for number, [found] in enumerate(together):
        assert isinstance(found, Gate)
        alone = fit_gate(tasks[number], others, POSITION)
        assert torch.equal(found.weights, alone.weights) and torch.equal(found.thresholds, alone.thresholds)
    many = fit_gates(tasks[:1] * 40, others, POSITION)  # more than are fitted at once
    assert all(torch.equal(gate.weights, together[0][0].weights) for [gate] in many)


def test_misspelt_names_have_to_be_clear_of_all_others_and_of_lookalikes():
    group, negatives, alike = saying(12, 0), random_rows(200, 1), saying(4, 5, strength=4)
    gate = fit(group, negatives, alike, clearance=0.15)
    highest = torch.cat([scores(gate, negatives), scores(gate, alike)]).max()
    assert float(gate.thresholds[0]) == pytest.approx(float(highest) + 0.15, abs=1e-5) and gate.gap == 0
    assert (gate.margins(alike) < 0).all() and (gate.margins(negatives) < 0).all()
    overlapping = fit(negatives[:5], negatives, clearance=0.15)
    assert (overlapping.margins(negatives) < 0).all()  # where names need not trip it, no gap is no error


def test_lookalikes_lower_no_threshold_of_the_name_itself():
    group, negatives, alike = saying(12, 0), random_rows(200, 1), saying(4, 5, strength=7.5)
    gate = fit(group, negatives, alike)
    lowest, highest = scores(gate, group).min(), scores(gate, negatives).max()
    assert float(gate.thresholds[0]) == pytest.approx(float(highest + POSITION * (lowest - highest)), abs=1e-5)


def test_no_gap_is_an_error_that_names_the_worst_first():
    group, negatives = saying(12, 0), random_rows(50, 1)
    for number, strength in ((7, 12.0), (31, 16.0), (40, 10.0)):
        negatives[number, 1] = 0
        negatives[number, 1, 0] = strength
    with pytest.raises(NoGateError, match="above the lowest prompt of the concept") as caught:
        fit(group, negatives)
    assert caught.value.negatives[:3] == [31, 7, 40]
    left_out = torch.zeros(50, dtype=torch.bool)
    left_out[31] = True
    with pytest.raises(NoGateError) as caught:
        fit(group, negatives, left_out=left_out)
    assert caught.value.negatives[:2] == [7, 40] and 31 not in caught.value.negatives


def test_the_hardest_others_count_again_which_widens_the_gap(monkeypatch):
    """Of 400 prompts two have one of the concept's two axes, too few to be much of a covariance."""
    group, negatives = saying(12, 0), random_rows(400, 1)
    group[:, 2, 1] += 6
    negatives[:2, 3] = 0
    negatives[:2, 3, 1] = 7
    monkeypatch.setattr(gates, "_NUM_HARD", 10)
    with_hard = fit(group, negatives)
    monkeypatch.setattr(gates, "_HARD_WEIGHT", 0.0)
    plain = fit(group, negatives)
    assert with_hard.gap > plain.gap + 0.02
    assert scores(with_hard, negatives[:2]).max() < 0.9 * scores(plain, negatives[:2]).max()


@pytest.mark.parametrize(
    ("lowest", "kept"),
    [
        ([[1.0, 0.0], [0.0, 1.0]], [0, 1]),
        ([[1.0, -1.0], [0.75, 1.0]], [1]),  # "Jeff Koons", whose prompts the gate of "Koons" tells as well
        ([[1.0, 0.75], [-1.0, 1.0]], [0]),
        ([[1.0, 1.0], [1.0, 1.0]], [1]),  # either, so one of them
        ([[1.0, 0.7], [0.7, 1.0]], [0, 1]),  # told, and not as clearly
        ([[1.0, 0.9, 0.0], [0.0, 1.0, 0.9], [0.0, 0.0, 1.0]], [0, 2]),
        ([[1.0, 0.0, 0.0], [0.9, 1.0, 0.0], [0.0, 0.9, 1.0]], [1, 2]),  # the third tells the second, and not the first
        ([[0.1]], [0]),
    ],
)
def test_gates_whose_prompts_others_tell_as_clearly_are_left_out(lowest, kept):
    """Gate k scores a row by its k-th number; of each group the second prompt is further from all thresholds."""
    size = len(lowest)
    gates = [Gate(torch.eye(size)[k : k + 1], torch.zeros(1), k) for k in range(size)]
    groups: list[Positives] = []
    for column in torch.tensor(lowest).T:
        rows = PromptRows.whole(torch.stack([column, column + 1])[:, None])
        groups.append(Positives(rows, torch.zeros(2, dtype=torch.long)))
    assert [gate.gap for gate in without_needless(gates, groups)] == kept  # which counts them here


def test_joined_gates_fire_where_any_does():
    negatives = random_rows(200, 1)
    groups = [saying(12, 0, axis=0), saying(12, 2, axis=1, strength=10)]
    first, second = (fit(group, negatives) for group in groups)
    misspelt = fit(groups[0], negatives, clearance=0.15)
    joined = join_gates([first, second, misspelt])
    assert joined.weights.shape == (3, WIDTH) and joined.gap == min(first.gap, second.gap)
    rows = torch.cat([groups[0], groups[1], negatives])
    expected = torch.stack([gate.margins(rows) for gate in (first, second, misspelt)]).amax(0)
    assert torch.allclose(joined.margins(rows), expected, atol=1e-6)
    assert (first.margins(groups[1]) < 0).all() and (joined.margins(groups[1]) > 0).all()


def test_a_gate_reads_halves_as_it_reads_floats():
    gate = fit(saying(12, 0), random_rows(200, 1))
    rows = random_rows(20, 4).half()
    assert torch.equal(gate.margins(rows), gate.margins(rows.float()))
