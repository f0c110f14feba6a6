"""Null spaces: their size, exactness and order, and what a basis says when no dimension is free."""

import pytest
import torch
from conftest import NamedModel

from ldm.erasure.null_space import (
    EXACT_TOLERANCE,
    NullSpaceBasis,
    leave_one_out_factors,
    null_space,
    qr_factor,
    relative_singular_values,
    suggest_tolerance,
)

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
    with pytest.raises(ValueError, match="`rank_rtol` 2 is outside"):
        null_space(torch.ones(2, 2), rank_rtol=2)
    with pytest.raises(ValueError, match="NaN"):
        null_space(torch.full((2, 2), float("nan")))


def test_no_room_says_how_many_prompts_fit():
    prompts = torch.randn(5, 2, 7)
    with pytest.raises(ValueError, match=r"no null space left: 5 protected prompts.*the first 3 fit.*`rank_rtol`"):
        NullSpaceBasis.fit(prompts, list("abcde"), EXACT_TOLERANCE, "svd")


@pytest.mark.parametrize("num_blocks", [1, 2, 5, 8])
def test_the_null_space_without_each_block_is_that_of_the_others(num_blocks):
    generator = torch.Generator().manual_seed(num_blocks)
    fixed_rows, *blocks = torch.randn(num_blocks + 1, 2, 40, generator=generator).double()
    for k, factor in enumerate(leave_one_out_factors(blocks, fixed_rows)):
        others = torch.cat([fixed_rows, *blocks[:k], *blocks[k + 1 :]])
        basis, rank = null_space(factor)
        assert rank == len(others) and (others @ basis.T).abs().max() < 1e-12
        values, relative = torch.linalg.svdvals(others), relative_singular_values(factor)
        assert torch.allclose(relative[:rank], values / values[0]) and not relative[rank:].any()


def test_a_qr_factor_has_the_gram_matrix_of_all_rows():
    first, second = torch.randn(3, 5), torch.randn(9, 5)
    factor, rows = qr_factor(first, second), torch.cat([first, second]).double()
    assert factor.shape == (5, 5) and torch.allclose(factor.T @ factor, rows.T @ rows)


def test_no_room_names_a_tolerance_that_makes_some():
    rows = torch.diag(10.0 ** -torch.arange(0, 8, 0.25))[:, None]  # 32 prompts of one token, values 1 to 2e-8
    prompts = [str(k) for k in range(32)]
    with pytest.raises(ValueError, match="raise `rank_rtol` to 5e-08") as error:
        NullSpaceBasis.fit(rows, prompts, 1e-9, "svd")
    assert "32 dimensions" in str(error.value)
    assert len(NullSpaceBasis.fit(rows, prompts, 5e-8, "svd").vectors) == 2
    assert suggest_tolerance(torch.ones(32)) is None


def test_a_basis_survives_a_file_and_belongs_to_one_model_and_width(tmp_path):
    path = tmp_path / "basis.safetensors"
    basis = NullSpaceBasis.fit(torch.randn(2, 2, 9), ["", "a"])
    basis.metadata["base_digest"] = "0" * 64
    basis.save(path)
    loaded = NullSpaceBasis.load(path)
    assert torch.equal(loaded.vectors, basis.vectors) and torch.equal(loaded.protected, basis.protected)
    assert loaded.metadata == basis.metadata and loaded.metadata["protected"] == ["", "a"]
    assert (loaded.metadata["rank"], loaded.metadata["width"], loaded.metadata["rank_rtol"]) == (4, 9, EXACT_TOLERANCE)
    loaded.check(NamedModel("0" * 64, context_dim=9), path)
    with pytest.raises(ValueError, match="another base model"):
        loaded.check(NamedModel("1" * 64, context_dim=9), path)
    with pytest.raises(ValueError, match="9 dimensions, the model's prompts have 8"):
        loaded.check(NamedModel("0" * 64, context_dim=8), path)
