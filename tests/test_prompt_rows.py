"""The rows of prompts by which gates are fitted: which are kept, and how those of many prompts lie together."""

import pytest
import torch

from ldm.erasure.negatives import Negatives
from ldm.erasure.prompt_rows import PromptRows, kept_positions, row_counts

RAGGED = [torch.arange(4.0).view(2, 2), torch.tensor([[9.0, 9.0]]), torch.tensor([[5.0, 0.0], [6.0, 1.0], [0.0, 7.0]])]


def random_rows(num: int, tokens: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(num, tokens, width, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("length", "total", "number", "expected"),
    [(3, 5, 9, [0, 1, 2, 3, 4]), (2, 9, 1, [0, 1, 2, 4, 8]), (5, 5, 3, [0, 1, 2, 3, 4]), (1, 77, 147, [0, 1, 75, 76])],
)
def test_all_tokens_are_kept_and_three_rows_of_padding(length, total, number, expected):
    assert kept_positions(length, total, number) == expected
    assert float(row_counts(expected, total).sum()) == total


def test_prompts_together_have_every_position_of_the_padding():
    assert {position for number in range(12) for position in kept_positions(3, 17, number)} == set(range(17))


def test_rows_of_prompts_are_found_again():
    joined = PromptRows.join(RAGGED, 2)
    assert len(joined) == 3 and joined.owners.tolist() == [0, 0, 1, 2, 2, 2]
    assert torch.equal(joined.at(torch.tensor([1, 0, 2])), torch.tensor([[2.0, 3.0], [9.0, 9.0], [0.0, 7.0]]))
    chosen = joined.select([2, 0])
    assert torch.equal(chosen.rows, torch.cat([RAGGED[2], RAGGED[0]])) and chosen.counts.tolist() == [3, 2]
    [weight] = weights = torch.tensor([[1.0, -1.0]])
    assert joined.highest(joined.rows @ weight).tolist() == [-1, 0, 5]
    assert torch.equal(
        joined.best(weights), torch.stack([RAGGED[0][0], RAGGED[1][0], RAGGED[2][0]])
    )  # of two the first
    assert len(PromptRows.join([], 2).best(weights)) == 0


def test_the_covariance_of_whitened_negatives_is_one_but_for_the_ridge():
    rows = random_rows(400, 3, 6) * torch.logspace(0, -1, 6) + 5
    negatives = Negatives(PromptRows.whole(rows), 1e-9)
    assert torch.allclose(negatives.rows.T.cov(correction=0), torch.eye(6), atol=1e-4)
    assert negatives.rows.mean(0).abs().max() < 1e-5
    directions, flat = random_rows(1, 2, 6, seed=1)[0], rows.flatten(0, 1)
    weights = negatives.weights(directions)
    assert torch.allclose(negatives.scores(weights), weights @ flat.T, atol=1e-3)
    differences = negatives.rows @ directions.T - flat @ weights.T  # a constant of each direction
    assert torch.allclose(differences, differences[:1].expand_as(differences), atol=1e-3)


def test_rows_that_prompts_share_count_once_and_are_left_out_with_the_last_of_them():
    rows = random_rows(4, 3, 6)
    rows[:, 0] = rows[0, 0]  # the first token of every prompt
    rows[2, 1] = rows[1, 1]
    negatives = Negatives(PromptRows.whole(rows), 0.1)
    assert len(negatives.rows) == 1 + 8 - 1
    out = negatives.rows_left_out(torch.tensor([False, False, True, False]))
    assert len(out) == 1 and torch.equal(negatives.rows[out], negatives.whiten(rows[2, 2:]))  # its third token alone
    out = negatives.rows_left_out(torch.tensor([False, True, True, False]))
    assert len(out) == 3 and not len(negatives.rows_left_out(torch.zeros(4, dtype=torch.bool)))
    assert negatives.prompts_of(torch.tensor([2, 0]), torch.tensor([True, False, False, True])) == [1, 2]
