"""The baseline that whole commands are measured against solves what its paper says."""

import torch
from bench.uce import edited_weight


def test_the_edited_weight_is_the_least_of_uces_objective():
    generator = torch.Generator().manual_seed(0)
    weight, edited, guides, preserved = (
        torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((5, 8), (2, 8), (2, 8), (3, 8))
    )
    result = edited_weight(weight, edited, guides, preserved, 0.5).requires_grad_()
    objective = ((edited @ result.T - guides @ weight.T) ** 2).sum()
    objective = objective + ((preserved @ (result - weight).T) ** 2).sum() + 0.5 * ((result - weight) ** 2).sum()
    (slope,) = torch.autograd.grad(objective, result)
    assert slope.abs().max() < 1e-9 and (result - weight).norm() > 0.1
