import pytest
import torch

from ldm.attention import kv_layers, trained
from ldm.shift import DenseShift, NullSpaceBasis, SeparableShift, WeightShift, applied, leaks, merge, null_space

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


def test_fewer_directions_are_those_that_the_concept_reaches_most():
    protected, concept = torch.randn(2, 2, 9), torch.randn(1, 2, 9)
    for method in METHODS:
        basis = NullSpaceBasis.solve(protected, ["a", "b"], 1e-7, method, {})
        assert basis.directions(concept, 5) is basis.vectors and basis.directions(concept, None) is basis.vectors
        few = basis.directions(concept, 2)
        assert torch.allclose(few @ few.T, torch.eye(2, dtype=torch.float64), atol=1e-10)
        assert (protected.flatten(0, 1).double() @ few.T).abs().max() < 1e-6
        within = basis.vectors.T @ torch.linalg.pinv(basis.vectors.T)  # the projection onto the null space
        seen = concept[0].double() @ within
        assert torch.allclose(seen @ few.T @ few, seen, atol=1e-8)  # two tokens, so two directions hold all of it


def random_shift(model, protected, seed=0, scale=0.5) -> SeparableShift:
    basis = NullSpaceBasis.solve(model.encode_prompt(protected), protected, 1e-7, "svd", {})
    generator = torch.Generator().manual_seed(seed)
    layers = kv_layers(model.unet)
    weights = {name: torch.randn(layer.out_features, len(basis.vectors), generator=generator) for name, layer in layers.items()}
    return SeparableShift(weights, basis.vectors, scale, {"base_digest": model.digest, "erased_index": seed, "scale": scale})


def test_delta_is_the_definition_and_survives_a_file(tiny, tmp_path):
    shift = random_shift(tiny, ["", "Picasso"])
    name = shift.names[0]
    expected = shift.coefficients[name.removesuffix(".weight")].double() @ (0.5 * shift.directions)
    assert torch.equal(shift.delta(name), expected)
    shift.save(tmp_path / "s.safetensors", shift.recipe)
    loaded = WeightShift.load(tmp_path / "s.safetensors")
    assert all(torch.equal(loaded.delta(name), shift.delta(name)) for name in shift.names)
    assert loaded.recipe["base_digest"] == tiny.digest and "torch" in loaded.recipe["versions"]


def test_a_shift_leaves_protected_prompts_alone_and_moves_others(tiny):
    shift = random_shift(tiny, ["", "Picasso"])
    latents, step = torch.randn(3, *tiny.latent_shape), torch.tensor(500)
    embedding = tiny.encode_prompt(["", "Picasso", "VanGogh"])
    before = tiny.predict_noise(latents, step, embedding)
    with applied(tiny.unet, [shift]):
        moved = (tiny.predict_noise(latents, step, embedding) - before).abs().amax((1, 2, 3))
    assert moved[0] < 1e-5 and moved[1] < 1e-5 and moved[2] > 1e-3


def test_merging_adds_up_in_any_order_and_leaving_out_restores_every_bit(tiny):
    layers = kv_layers(tiny.unet)
    base = {name: layer.weight.clone() for name, layer in layers.items()}
    tensors = {name: layer.weight for name, layer in layers.items()}
    first, second = random_shift(tiny, [""], 1), random_shift(tiny, ["", "Cezanne"], 2)
    both = merge(tiny.unet, [first, second])
    swapped = merge(tiny.unet, [second, first])
    for name, layer in layers.items():
        weight = f"{name}.weight"
        expected = base[name].double() + first.delta(weight) + second.delta(weight)
        assert torch.equal(both[weight], expected.float()) and torch.allclose(both[weight], swapped[weight], atol=1e-6)
    with pytest.raises(RuntimeError), applied(tiny.unet, [first, second]):
        assert torch.equal(next(iter(layers.values())).weight, next(iter(both.values())))
        raise RuntimeError
    for name, layer in layers.items():
        assert layer.weight is tensors[name] and torch.equal(layer.weight, base[name])
    assert merge(tiny.unet, []) == {}


def test_leaks_are_the_relative_change_of_what_a_prompt_sees(tiny):
    layers = kv_layers(tiny.unet)
    shift = random_shift(tiny, ["", "Picasso"])
    seen = {prompt: tiny.encode_prompt([prompt])[0] for prompt in ("Picasso", "VanGogh")}
    rows = {row["prompt"]: row["leak"] for row in leaks(layers, {"1": shift}, seen)}
    e = seen["VanGogh"].double()
    moved = sum((e @ shift.delta(f"{name}.weight").T).square().sum() for name in layers).sqrt()
    base = sum((e @ layer.weight.double().T).square().sum() for layer in layers.values()).sqrt()
    assert rows["Picasso"] < 1e-6 and rows["VanGogh"] == pytest.approx(float(moved / base))


def test_foreign_shifts_are_refused(tiny, tmp_path):
    layers, path = kv_layers(tiny.unet), tmp_path / "s.safetensors"
    shift = random_shift(tiny, [""])
    shift.save(path, shift.recipe)
    with pytest.raises(ValueError, match="another base model"):
        WeightShift.load(path).check("0" * 64, tiny.unet)
    name = next(iter(shift.coefficients))
    shift.coefficients[name] = shift.coefficients[name][:3]
    shift.save(path, shift.recipe)
    with pytest.raises(ValueError, match="does not fit the model's layer"):
        WeightShift.load(path).check(tiny.digest, tiny.unet)
    shift.coefficients[name] = shift.coefficients[name][:, :3]
    shift.save(path, shift.recipe)
    with pytest.raises(ValueError, match="wrong names or shapes"):
        WeightShift.load(path)


def test_a_dense_shift_is_what_leads_to_the_trained_weights(tiny, tmp_path):
    names = trained(tiny.unet, "full")[:4]
    student = {name: tiny.unet.get_parameter(name) + (0 if k == 1 else 1) for k, name in enumerate(names)}
    shift = DenseShift.between(tiny.unet, student)
    assert shift.names == [names[0], *names[2:]]  # what did not change is left out
    shift.save(tmp_path / "d.safetensors", {"base_digest": tiny.digest})
    loaded = WeightShift.load(tmp_path / "d.safetensors")
    loaded.check(tiny.digest, tiny.unet)
    base = {name: tiny.unet.get_parameter(name) for name in names}
    with applied(tiny.unet, [loaded]):
        assert all(torch.allclose(tiny.unet.get_parameter(name), weight, atol=1e-6) for name, weight in student.items())
    assert all(tiny.unet.get_parameter(name) is weight for name, weight in base.items())


def test_dense_and_separable_shifts_add_up(tiny):
    separable = random_shift(tiny, [""])
    name = separable.names[0]
    dense = DenseShift({name: torch.ones(separable.shape(name))})
    expected = tiny.unet.get_parameter(name).double() + separable.delta(name) + 1
    assert torch.equal(merge(tiny.unet, [separable, dense])[name], expected.float())


def test_a_dense_shift_of_another_model_is_refused(tiny, tmp_path):
    DenseShift({"conv_in.weight": torch.ones(2, 2)}).save(tmp_path / "d.safetensors", {"base_digest": tiny.digest})
    with pytest.raises(ValueError, match="conv_in.weight does not fit"):
        WeightShift.load(tmp_path / "d.safetensors").check(tiny.digest, tiny.unet)
