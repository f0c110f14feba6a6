import pytest
import torch

from ldm.erasure.null_space import NullSpaceBasis, leave_one_out_factors, null_space, relative_singular_values, suggest_tolerance

METHODS = ("svd", "elimination")


@pytest.mark.parametrize("method", METHODS)
def test_null_space_at_stable_diffusions_size(method):
    """Three prompts of 77 tokens whose first token is the same: 231 rows, rank 229."""
    prompts = torch.randn(3, 77, 768, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    prompts[:, 0] = prompts[0, 0]
    rows = prompts.flatten(0, 1)
    basis, rank = null_space(rows, method=method)
    assert rank == 229 and basis.shape == (768 - 229, 768) and basis.dtype == torch.float64
    assert (rows @ basis.T).abs().max() <= 1e-10
    assert torch.allclose(basis.norm(dim=1), torch.ones(539, dtype=torch.float64))
    assert torch.linalg.matrix_rank(basis) == 539


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(3, 5), (9, 5), (5, 5)])
def test_null_space_of_wide_tall_and_square_rows(method, shape):
    left, right = torch.randn(shape[0], 2, dtype=torch.float64), torch.randn(2, shape[1], dtype=torch.float64)
    basis, rank = null_space(left @ right, method=method)
    assert rank == 2 and basis.shape == (3, 5) and (left @ right @ basis.T).abs().max() < 1e-12


def test_a_coarser_tolerance_frees_weak_directions_and_the_weakest_come_first():
    rows = torch.diag(torch.tensor([1.0, 1e-2, 1e-4, 1e-9]))
    assert null_space(rows, 1e-7)[1] == 3 and null_space(rows, 1e-3)[1] == 2
    basis, _ = null_space(rows, 1e-1)
    assert basis.abs().argmax(1).tolist() == [3, 2, 1]


def test_bad_requests_are_refused():
    with pytest.raises(ValueError, match="elimination"):
        null_space(torch.ones(2, 2), method="guess")
    with pytest.raises(ValueError, match="tolerance"):
        null_space(torch.ones(2, 2), tolerance=2)
    with pytest.raises(ValueError, match="NaN"):
        null_space(torch.full((2, 2), float("nan")))


def test_no_room_says_how_many_prompts_fit():
    prompts = torch.randn(5, 2, 7)
    with pytest.raises(ValueError, match="no null space left: 5 protected prompts.*the first 3 fit.*tolerance"):
        NullSpaceBasis.solve(prompts, list("abcde"), 1e-7, "svd", {})


NOTHING = torch.zeros(9, 9, dtype=torch.float64)


def test_directions_are_those_along_which_the_concept_reaches_the_strongest_first():
    protected, concept = torch.randn(2, 2, 9), torch.randn(1, 2, 9)
    for method in METHODS:
        basis = NullSpaceBasis.solve(protected, ["a", "b"], 1e-7, method, {})
        directions, cost = basis.directions(concept, None, 0.5, 0.0, NOTHING)
        assert len(directions) == 2  # two tokens: a gradient on them acts nowhere else
        for most in (1, 5):
            assert torch.allclose(basis.directions(concept, most, 0.5, 0.0, NOTHING)[0], directions[:most])
        assert torch.allclose(directions @ directions.T, torch.eye(2, dtype=torch.float64), atol=1e-10)
        assert (protected.flatten(0, 1).double() @ directions.T).abs().max() < 1e-6
        within = basis.vectors.T @ torch.linalg.pinv(basis.vectors.T)  # the projection onto the null space
        seen = concept[0].double() @ within
        assert torch.allclose(seen @ directions.T @ directions, seen, atol=1e-8)
        reach = (seen @ directions.T).norm(dim=0)
        assert reach[0] >= reach[1] and torch.allclose(cost, 0.5 * reach[0] ** 2 * torch.eye(2, dtype=torch.float64))


def test_directions_turn_away_from_what_is_spared():
    protected, concept, other = torch.randn(3, 1, 2, 9)
    basis = NullSpaceBasis.solve(protected, ["a"], 1e-7, "svd", {})
    spared = 1e6 * other[0].double().T @ other[0].double()
    plain, _ = basis.directions(concept, None, 0.01, 0.0, NOTHING)
    turned, cost = basis.directions(concept, None, 0.01, 0.0, spared)
    assert (other[0].double() @ turned.T).norm() < 1e-2 * (other[0].double() @ plain.T).norm()
    assert (concept[0].double() @ turned.T).norm() > 0.1 * (concept[0].double() @ plain.T).norm()
    reach = torch.linalg.matrix_norm(concept[0].double() @ torch.linalg.qr(basis.vectors.T).Q, ord=2)
    expected = turned @ (0.01 * reach ** 2 * torch.eye(9, dtype=torch.float64) + spared) @ turned.T
    assert torch.allclose(cost, expected)


def test_where_the_tolerance_lets_protected_prompts_move_keeping_them_costs():
    protected, concept = torch.eye(9)[:1, None], torch.randn(1, 2, 9)
    strong = torch.cat([100 * torch.eye(9)[1:2, None], protected])
    basis = NullSpaceBasis.solve(strong, ["a", "b"], 0.1, "svd", {})
    assert len(basis.vectors) == 8  # the second prompt is weak, and not in the way
    free, _ = basis.directions(concept, None, 0.01, 0.0, NOTHING)
    kept, cost = basis.directions(concept, None, 0.01, 1e4, NOTHING)
    assert kept[0, 0].abs() < 1e-2 * free[0, 0].abs()
    reach = torch.linalg.matrix_norm(concept[0].double() @ torch.linalg.qr(basis.vectors.T).Q, ord=2)
    moved = kept @ strong.flatten(0, 1).double().T
    assert torch.allclose(cost, 0.01 * reach ** 2 * torch.eye(2, dtype=torch.float64) + 1e4 * moved @ moved.T)


def test_a_concept_that_the_protected_prompts_say_is_refused():
    protected = torch.randn(2, 2, 9)
    basis = NullSpaceBasis.solve(protected, ["a", "b"], 1e-7, "svd", {})
    with pytest.raises(ValueError, match="protect fewer"):
        basis.directions(protected[:1], None, 0.1, 0.0, NOTHING)


@pytest.mark.parametrize("number", [1, 2, 5, 8])
def test_the_null_space_without_each_block_is_that_of_the_others(number):
    generator = torch.Generator().manual_seed(number)
    rest, *blocks = torch.randn(number + 1, 2, 40, generator=generator).double()
    for k, rows in enumerate(leave_one_out_factors(blocks, rest)):
        others = torch.cat([rest, *blocks[:k], *blocks[k + 1:]])
        basis, rank = null_space(rows)
        assert rank == len(others) and (others @ basis.T).abs().max() < 1e-12
        values = torch.linalg.svdvals(others)
        assert torch.allclose(relative_singular_values(rows)[:rank], values / values[0]) and not relative_singular_values(rows)[rank:].any()


def test_no_room_names_a_tolerance_that_makes_some():
    rows = torch.diag(10.0 ** -torch.arange(0, 8, 0.25))[:, None]  # 32 prompts of one token, values 1 to 2e-8
    with pytest.raises(ValueError, match="raise --tolerance to 5e-08") as error:
        NullSpaceBasis.solve(rows, [str(k) for k in range(32)], 1e-9, "svd", {})
    assert "32 dimensions" in str(error.value)
    assert len(NullSpaceBasis.solve(rows, [str(k) for k in range(32)], 5e-8, "svd", {}).vectors) == 2
    assert suggest_tolerance(torch.ones(32)) is None
