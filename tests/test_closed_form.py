"""The closed form on small tensors: where it acts, what it costs, and that its solution is the minimum."""

import pytest
import torch
from torch import nn

from ldm.diffusion.text_layers import text_layers
from ldm.erasure.closed_form import MIN_GAIN, Costs, ErasureSpace, closed_form_map, erasure_space
from ldm.erasure.initial_shift import separable_shift
from ldm.erasure.merge import applied
from ldm.erasure.null_space import NullSpaceBasis

ZEROS = torch.zeros(9, 9, dtype=torch.float64)


def fit(embeds, *prompts, rank_rtol=1e-7, method="svd"):
    return NullSpaceBasis.fit(embeds, list(prompts), rank_rtol, method)


def space_of(basis, target_embeds, ridge_weight, preserve_scale=0.0, preserve_gram=ZEROS, max_directions=None):
    costs = Costs(ridge_weight, preserve_scale, preserve_gram)
    return erasure_space(basis.vectors, basis.protected, target_embeds, costs, max_directions)


def max_projection(basis, rows):
    """Return the largest projection of rows (n, d) on a direction of the null space."""
    return torch.linalg.matrix_norm(rows.double() @ torch.linalg.qr(basis.vectors.T).Q, ord=2)


@pytest.mark.parametrize("method", ["svd", "elimination"])
def test_directions_are_those_of_the_concepts_projection_the_largest_first(method):
    protected, target = torch.randn(2, 2, 9), torch.randn(1, 2, 9)
    basis = fit(protected, "a", "b", method=method)
    space = space_of(basis, target, 0.5)
    directions = space.directions
    assert len(directions) == 2  # two tokens: a gradient on them acts nowhere else
    for max_directions in (1, 5):
        fewer = space_of(basis, target, 0.5, max_directions=max_directions).directions
        assert torch.allclose(fewer, directions[:max_directions])
    assert torch.allclose(directions @ directions.T, torch.eye(2, dtype=torch.float64), atol=1e-10)
    assert (protected.flatten(0, 1).double() @ directions.T).abs().max() < 1e-6
    null_projector = basis.vectors.T @ torch.linalg.pinv(basis.vectors.T)
    rows = target[0].double() @ null_projector
    assert torch.allclose(rows @ directions.T @ directions, rows, atol=1e-8)
    projection = (rows @ directions.T).norm(dim=0)
    expected_cost = 0.5 * projection[0] ** 2 * torch.eye(2, dtype=torch.float64)
    assert projection[0] >= projection[1] and torch.allclose(space.cost, expected_cost)


def test_directions_turn_away_from_what_is_preserved():
    protected, target, other = torch.randn(3, 1, 2, 9)
    basis = fit(protected, "a")
    gram = 1e6 * other[0].double().T @ other[0].double()
    plain = space_of(basis, target, 0.01).directions
    space = space_of(basis, target, 0.01, preserve_gram=gram)
    turned = space.directions
    assert (other[0].double() @ turned.T).norm() < 1e-2 * (other[0].double() @ plain.T).norm()
    assert (target[0].double() @ turned.T).norm() > 0.1 * (target[0].double() @ plain.T).norm()
    ridge = 0.01 * max_projection(basis, target[0]) ** 2 * torch.eye(9, dtype=torch.float64)
    assert torch.allclose(space.cost, turned @ (ridge + gram) @ turned.T)


def test_where_the_tolerance_lets_protected_prompts_change_preserving_them_costs():
    protected, target = torch.eye(9)[:1, None], torch.randn(1, 2, 9)
    embeds = torch.cat([100 * torch.eye(9)[1:2, None], protected])
    basis = fit(embeds, "a", "b", rank_rtol=0.1)
    assert len(basis.vectors) == 8  # the second prompt is weak, and not in the way
    free = space_of(basis, target, 0.01).directions
    space = space_of(basis, target, 0.01, preserve_scale=1e4)
    preserving = space.directions
    assert preserving[0, 0].abs() < 1e-2 * free[0, 0].abs()
    change = preserving @ embeds.flatten(0, 1).double().T
    ridge = 0.01 * max_projection(basis, target[0]) ** 2 * torch.eye(2, dtype=torch.float64)
    assert torch.allclose(space.cost, ridge + 1e4 * change @ change.T)


def test_directions_whose_gain_is_below_the_minimum_are_left_out():
    """Where nothing protected is in the way, a token's gain is its size over the largest's, by the ridge's root."""
    ridge_weight = 0.25
    basis = fit(torch.eye(9)[:1, None], "a")
    for gain, expected in ((1.01 * MIN_GAIN, 2), (0.99 * MIN_GAIN, 1)):
        target = torch.stack([torch.eye(9)[1], ridge_weight**0.5 * gain * torch.eye(9)[2]])[None]
        assert len(space_of(basis, target, ridge_weight).directions) == expected


def test_a_concept_that_the_protected_prompts_say_is_refused():
    protected = torch.randn(2, 2, 9)
    with pytest.raises(ValueError, match="protect fewer"):
        space_of(fit(protected, "a", "b"), protected[:1], 0.1)


@pytest.mark.parametrize("num_anchors", [1, 3])
def test_the_solution_is_the_minimum(num_anchors):
    """No other w gives a smaller `|X (W + dW)^T - Y W^T|^2 + tr(w C w^T)`, whose gradient is zero there."""
    protected, targets, anchors = torch.randn(2, 2, 9), torch.randn(3, 2, 9), torch.randn(num_anchors, 2, 9)
    other = torch.randn(4, 9, dtype=torch.float64)
    space = space_of(fit(protected, "a", "b"), targets, 0.1, preserve_gram=other.T @ other)
    weight = torch.randn(7, 9, dtype=torch.float64)
    target_rows = targets.flatten(0, 1).double()
    anchor_rows = anchors.expand_as(targets).flatten(0, 1).double()

    def objective(coefficients):
        delta = coefficients @ space.directions
        error = target_rows @ (weight + delta).T - anchor_rows @ weight.T
        return error.square().sum() + (coefficients @ space.cost @ coefficients.T).trace()

    solution = (weight @ closed_form_map(space, targets, anchors)).requires_grad_()
    value = objective(solution)
    (gradient,) = torch.autograd.grad(value, solution)
    zero = torch.zeros_like(solution, requires_grad=True)
    scale = torch.autograd.grad(objective(zero), zero)[0].norm()
    assert gradient.norm() < 1e-10 * scale
    for _ in range(20):
        assert objective(solution + 0.1 * torch.randn_like(solution)) > value


def test_one_map_of_the_embeddings_serves_all_layers():
    """`w = W A`, so that `(W + dW) e = W (e + A S e)` for every layer and embedding; the scale of the basis cancels."""
    protected, targets, anchor = torch.randn(2, 2, 9), torch.randn(3, 2, 9), torch.randn(1, 2, 9)
    space = space_of(fit(protected, "a", "b"), targets, 0.1)
    embedding_map = closed_form_map(space, targets, anchor)
    assert embedding_map.shape == (9, len(space.directions)) and embedding_map.dtype == torch.float64
    layers = {"a": nn.Linear(9, 4, bias=False), "b": nn.Linear(9, 6, bias=False)}
    embeds = torch.randn(5, 9, dtype=torch.float64)
    for scale in (1.0, 0.05):
        shift = separable_shift(layers, space.directions, scale, embedding_map)
        assert all(weight.requires_grad and weight.dtype == torch.float32 for weight in shift.parameters())
        for name, layer in layers.items():
            weight = layer.weight.detach().double()
            changed = embeds @ (weight + shift.delta_weight(f"{name}.weight")).T
            mapped = embeds + embeds @ space.directions.T @ embedding_map.T
            assert torch.allclose(changed, mapped @ weight.T, atol=1e-5)


def test_the_closed_form_is_the_cheapest_change_towards_the_anchors_keys_and_values(tiny):
    """Within the null space the gradient of `|X (W + dW)^T - Y W^T|^2 + ridge s^2 |dW|^2 + tr(dW G dW^T)` is zero."""
    layers, scale, ridge_weight = text_layers(tiny.denoiser), 0.5, 0.1
    basis = fit(tiny.encode_prompt(["", "Picasso"]), "", "Picasso")
    null_basis = torch.linalg.qr(basis.vectors.T).Q
    targets, anchor = tiny.encode_prompt(["VanGogh", "VanGogh painting"]), tiny.encode_prompt(["a photo of a church"])
    target_rows, anchor_rows = (rows.flatten(0, 1).double() for rows in (targets, anchor.expand_as(targets)))
    for gram in (torch.zeros(96, 96, dtype=torch.float64), tiny.vocab_gram_without("VanGogh")):
        space = space_of(basis, targets, ridge_weight, preserve_gram=gram)
        embedding_map = closed_form_map(space, targets, anchor)
        shift = separable_shift(layers, space.directions, scale, embedding_map)
        size = max_projection(basis, target_rows) ** 2
        for name, layer in layers.items():
            delta, weight = shift.delta_weight(f"{name}.weight"), layer.weight.double()
            error = target_rows @ (weight + delta).T - anchor_rows @ weight.T
            gradient = (error.T @ target_rows + ridge_weight * size * delta + delta @ gram) @ null_basis
            # directions below MIN_GAIN are left out
            assert gradient.norm() < 2e-3 * (error.T @ target_rows).norm()
            assert error.norm() < (target_rows @ weight.T - anchor_rows @ weight.T).norm()


def test_without_a_cost_a_concept_predicts_its_anchors_noise(tiny):
    layers = text_layers(tiny.denoiser)
    targets, anchor = tiny.encode_prompt(["VanGogh", "VanGogh painting"]), tiny.encode_prompt(["a photo of a church"])
    identity = torch.eye(96, dtype=torch.float64)
    space = ErasureSpace(identity, 1e-12 * identity)
    exact = separable_shift(layers, identity, 0.5, closed_form_map(space, targets, anchor))
    latents, timestep = torch.randn(1, *tiny.latent_shape), torch.tensor(500)
    with applied(tiny.denoiser, [exact]):
        edited = tiny.predict_noise(latents, timestep, targets[:1])
    assert torch.allclose(edited, tiny.predict_noise(latents, timestep, anchor), atol=1e-4)
