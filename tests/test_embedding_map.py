"""Maps of embeddings: ridge regression in few directions, and what several of them are together."""

import pytest
import torch

from ldm.erasure.embedding_map import EmbeddingMap, fit_map, join_maps, main_directions

WIDTH, TINY_RIDGE = 12, 1e-12


def random_rows(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def spanned(num: int, rank: int, seed: int) -> torch.Tensor:
    """Return rows (num, d) that span `rank` directions."""
    return random_rows(num, rank, seed=seed) @ random_rows(rank, WIDTH, seed=seed + 100)


def test_a_linear_map_is_reproduced_inside_the_span_and_nothing_happens_outside():
    matrix, targets = random_rows(WIDTH, WIDTH, seed=0), spanned(30, 5, 1)
    found = fit_map(targets, targets @ matrix, TINY_RIDGE, 5)
    inside = random_rows(8, 5, seed=2) @ random_rows(5, WIDTH, seed=101)  # of the same span
    assert torch.allclose(found(inside), inside @ matrix, atol=1e-5)
    outside = random_rows(8, WIDTH, seed=3)
    outside -= outside @ found.directions.T @ found.directions
    assert torch.allclose(found(outside), outside, atol=1e-10)


def test_a_map_is_the_ridge_regression_of_the_differences():
    targets, anchors = random_rows(40, WIDTH, seed=0), random_rows(40, WIDTH, seed=1)
    found = fit_map(targets, anchors, 0.1, WIDTH)
    penalty = 0.1 * torch.linalg.eigvalsh(targets.T @ targets / 40)[-1]
    gram = targets.T @ targets / 40 + penalty * torch.eye(WIDTH)
    expected = torch.linalg.solve(gram, targets.T @ (anchors - targets) / 40)  # (d, d), to multiply rows from the right
    assert torch.allclose(found(targets), targets + targets @ expected) and found.penalty == pytest.approx(penalty)


@pytest.mark.parametrize(("num", "rank", "expected"), [(30, 4, 4), (30, 100, WIDTH), (3, 100, 3)])
def test_the_rank_is_bounded_by_the_setting_the_rows_and_the_width(num, rank, expected):
    targets = random_rows(num, WIDTH, seed=0)
    found = fit_map(targets.float(), targets.float(), 0.01, rank)
    assert found.directions.shape == (expected, WIDTH) and found.outputs.shape == (WIDTH, expected)
    assert found.gram.shape == (expected, expected)
    assert torch.allclose(found.directions @ found.directions.T, torch.eye(expected, dtype=torch.float64), atol=1e-9)


def test_the_main_directions_are_kept():
    targets = random_rows(50, WIDTH, seed=0) * torch.tensor([10.0, 9, *[0.1] * (WIDTH - 2)])
    found = fit_map(targets, torch.zeros_like(targets), 0.01, 2)
    assert found.directions[:, :2].det().abs() > 0.9


def test_the_more_ridge_the_less_changes():
    targets, anchors = random_rows(40, WIDTH, seed=0), random_rows(40, WIDTH, seed=1)
    changes = [float((fit_map(targets, anchors, ridge, 8)(targets) - targets).norm()) for ridge in (1e-3, 0.1, 10)]
    assert changes[0] > changes[1] > changes[2]


def test_rows_keep_their_shape_and_dtype():
    targets = random_rows(20, WIDTH, seed=0)
    found = fit_map(targets, -targets, 0.01, 4)
    for dtype in (torch.float16, torch.float32):
        rows = random_rows(2, 3, WIDTH, seed=1).to(dtype)
        assert found(rows).dtype == dtype and found(rows).shape == rows.shape


def test_joined_maps_are_the_fit_on_the_rows_of_both():
    targets = [random_rows(30, WIDTH, seed=seed) for seed in (0, 1)]
    anchors = [random_rows(30, WIDTH, seed=seed) for seed in (2, 3)]
    maps = [fit_map(*rows, 0.01, WIDTH) for rows in zip(targets, anchors, strict=True)]
    joined = join_maps(maps)
    penalty = max(each.penalty for each in maps)
    rows, aims = torch.cat(targets), torch.cat(anchors)
    gram = rows.T @ rows / 30 + penalty * torch.eye(WIDTH)
    expected = rows + rows @ torch.linalg.solve(gram, rows.T @ (aims - rows) / 30)
    assert torch.allclose(joined(rows), expected, atol=1e-9)


def test_joined_maps_of_two_spans_do_in_each_what_its_own_does():
    matrices = [random_rows(WIDTH, WIDTH, seed=seed) for seed in (0, 1)]
    targets = [spanned(30, 4, seed) for seed in (2, 3)]
    maps = [fit_map(rows, rows @ matrix, TINY_RIDGE, 4) for rows, matrix in zip(targets, matrices, strict=True)]
    joined = join_maps(maps)
    assert len(joined.directions) == 8
    for rows, matrix in zip(targets, matrices, strict=True):
        assert torch.allclose(joined(rows), rows @ matrix, atol=1e-4)


def test_joined_maps_do_not_overshoot_where_their_sum_does():
    """Two names in the same sentence share most rows: each map moves these all of the way."""
    shared = spanned(40, 6, 0)
    anchors = shared @ random_rows(WIDTH, WIDTH, seed=1)
    maps = [fit_map(shared + 0.01 * random_rows(40, WIDTH, seed=seed), anchors, 1e-3, 6) for seed in (2, 3)]
    summed = shared + sum(each(shared) - shared for each in maps)
    before, once, twice = (float((rows - anchors).norm()) for rows in (shared, join_maps(maps)(shared), summed))
    assert once < 0.05 * before and twice > 0.9 * before


def test_the_order_of_joining_does_not_matter_and_one_map_is_itself():
    maps = [fit_map(spanned(30, 4, seed), spanned(30, 4, seed + 10), 0.01, 4) for seed in (0, 1, 2)]
    rows = random_rows(5, WIDTH, seed=5)
    assert torch.allclose(join_maps(maps)(rows), join_maps(maps[::-1])(rows), atol=1e-9)
    assert join_maps(maps[:1]) is maps[0]


def test_maps_in_the_same_directions_are_joined_in_these_alone():
    maps = [fit_map(spanned(30, 4, 0), spanned(30, 4, seed), 0.01, 4) for seed in (1, 2)]
    joined = join_maps(maps)
    assert len(joined.directions) == 4 and isinstance(joined, EmbeddingMap)
    assert torch.allclose(joined.directions @ joined.directions.T, torch.eye(4, dtype=torch.float64), atol=1e-9)


def distance_left(found: EmbeddingMap, targets: torch.Tensor, anchors: torch.Tensor) -> float:
    """Return the penalised mean square distance that a map leaves, which its fit makes smallest."""
    outputs = found.outputs @ found.directions
    return float((found(targets) - anchors).square().sum() / len(targets) + found.penalty * outputs.square().sum())


def test_a_cut_map_leaves_the_least_that_its_rank_can_leave():
    """No map of rank r does better: the best one has the gains of the r largest singular values."""
    targets, anchors = random_rows(60, WIDTH, seed=0), random_rows(60, WIDTH, seed=1)
    whole = fit_map(targets, anchors, 0.1, WIDTH)
    gains, before = whole._reduced()[0], float((targets - anchors).square().sum()) / 60
    assert torch.allclose(gains, gains.sort(descending=True).values)
    for rank in (1, 3, 7):
        found = whole.cut_to(0, 1, rank)
        assert found.directions.shape == (rank, WIDTH)
        assert torch.allclose(found.directions @ found.directions.T, torch.eye(rank, dtype=torch.float64), atol=1e-9)
        assert distance_left(found, targets, anchors) == pytest.approx(before - float(gains[:rank].sum()))
        others = whole.outputs @ whole.directions  # cut in the outputs' own metric instead
        left, values, right = torch.linalg.svd(others)
        plain = EmbeddingMap(left[:, :rank] * values[:rank], right[:rank], found.gram, whole.penalty)
        assert distance_left(found, targets, anchors) < distance_left(plain, targets, anchors)
    assert whole.cut_to(0, 1, WIDTH) is whole


def test_cut_maps_are_joined_as_whole_ones_are():
    """Their normal equations are those of a fit in their own directions."""
    targets, anchors = random_rows(60, WIDTH, seed=0), random_rows(60, WIDTH, seed=1)
    found = fit_map(targets, anchors, 0.1, WIDTH).cut_to(0, 1, 4)
    projections = targets @ found.directions.T
    gram = projections.T @ projections / 60 + found.penalty * torch.eye(4)
    assert torch.allclose(found.gram, gram)
    assert torch.allclose(found.outputs @ gram, (anchors - targets).T @ projections / 60)
    joined = join_maps([found, found])
    rows = random_rows(5, WIDTH, seed=2)
    assert len(joined.directions) == 4 and torch.allclose(joined(rows), found(rows), atol=0.2)


def test_the_rank_is_the_lowest_that_leaves_hardly_more_than_the_whole():
    rows = random_rows(80, WIDTH, seed=0)
    change = torch.zeros(WIDTH, WIDTH, dtype=torch.float64)
    change[0, 1], change[2, 3], change[4, 5] = 3, 2, 0.1  # whose shares of the way are about 9, 4 and 0.01 of 13
    anchors = rows + rows @ change
    assert [len(fit_map(rows, anchors, TINY_RIDGE, WIDTH, loss).directions) for loss in (0.5, 0.1, 1e-4)] == [1, 2, 3]
    few = [fit_map(rows, anchors, TINY_RIDGE, WIDTH, loss, most=2) for loss in (0, 0.5, 1e-4)]
    assert [len(found.directions) for found in few] == [2, 1, 2]


@pytest.mark.parametrize("most", [1, 3])
def test_rows_go_as_far_on_average_by_few_directions_as_by_all(most):
    """How far is their mean movement along the way to the anchors, as a fraction of the way."""
    rows, anchors = random_rows(80, WIDTH, seed=0), random_rows(80, WIDTH, seed=1)

    def moved(found):
        way = anchors - rows
        return float(((found(rows) - rows) * way).sum() / way.square().sum())

    whole, cut = fit_map(rows, anchors, 1e-9, WIDTH), fit_map(rows, anchors, 1e-9, WIDTH, most=most)
    assert moved(cut) == pytest.approx(moved(whole)) and len(cut.directions) == most
    assert moved(whole.cut_to(0, 1, most)) < 0.9 * moved(whole)


def test_rows_count_as_often_as_is_said():
    targets, anchors = random_rows(20, WIDTH, seed=0), random_rows(20, WIDTH, seed=1)
    counts = torch.tensor([1.0] * 15 + [3.0] * 5)
    repeated = [rows.repeat_interleave(counts.long(), 0) for rows in (targets, anchors)]
    found, expected = fit_map(targets, anchors, 0.1, 4, counts=counts), fit_map(*repeated, 0.1, 4)
    assert torch.allclose(found(targets), expected(targets), atol=1e-6)


def test_few_of_many_directions_are_the_main_ones():
    rows = random_rows(400, 120, seed=0) * torch.logspace(0, -3, 120)
    found, largest = main_directions(rows, 8)
    values = torch.linalg.eigvalsh(rows.T @ rows)
    assert found.shape == (8, 120) and largest == pytest.approx(float(values[-1]), rel=1e-2)
    assert (rows.double() @ found.T).square().sum() > 0.98 * values[-8:].sum()
    again, _ = main_directions(rows, 8)
    assert torch.equal(found, again)


def test_a_rounded_map_is_what_half_precision_has_and_does_the_same():
    targets, anchors = random_rows(40, WIDTH, seed=0), random_rows(40, WIDTH, seed=1)
    whole = fit_map(targets, anchors, 0.01, 6)
    found = whole.rounded()
    for part in (found.outputs, found.directions):
        assert part.dtype == torch.float64 and torch.equal(part.half().double(), part)
    assert torch.allclose(found(targets), whole(targets), atol=5e-3) and torch.equal(found.gram, whole.gram)
    large = EmbeddingMap(1e9 * whole.outputs, whole.directions, whole.gram, whole.penalty)
    assert large.rounded() is large
