import pytest
import torch

from ldm.diffusion.text_layers import text_layers
from ldm.diffusion.trainable import trainable_parameter_names
from ldm.erasure.null_space import NullSpaceBasis
from ldm.erasure.leakage import leakage
from ldm.erasure.merge import applied, merge
from ldm.erasure.shift import DenseShift, SeparableShift, WeightShift

def random_shift(model, protected, seed=0, scale=0.5) -> SeparableShift:
    basis = NullSpaceBasis.solve(model.encode_prompt(protected), protected, 1e-7, "svd", {})
    generator = torch.Generator().manual_seed(seed)
    layers = text_layers(model.unet)
    weights = {name: torch.randn(layer.out_features, len(basis.vectors), generator=generator) for name, layer in layers.items()}
    return SeparableShift(weights, basis.vectors, scale, {"base_digest": model.digest, "erased_index": seed, "scale": scale})


def test_delta_is_the_definition_and_survives_a_file(tiny, tmp_path):
    shift = random_shift(tiny, ["", "Picasso"])
    name = shift.names[0]
    expected = shift.coefficients[name.removesuffix(".weight")].double() @ (0.5 * shift.directions)
    assert torch.equal(shift.delta(name), expected)
    shift.save(tmp_path / "s.safetensors", shift.metadata)
    loaded = WeightShift.load(tmp_path / "s.safetensors")
    assert all(torch.equal(loaded.delta(name), shift.delta(name)) for name in shift.names)
    assert loaded.metadata["base_digest"] == tiny.digest and "torch" in loaded.metadata["versions"]


def test_a_shift_leaves_protected_prompts_alone_and_moves_others(tiny):
    shift = random_shift(tiny, ["", "Picasso"])
    latents, step = torch.randn(3, *tiny.latent_shape), torch.tensor(500)
    embedding = tiny.encode_prompt(["", "Picasso", "VanGogh"])
    before = tiny.predict_noise(latents, step, embedding)
    with applied(tiny.unet, [shift]):
        moved = (tiny.predict_noise(latents, step, embedding) - before).abs().amax((1, 2, 3))
    assert moved[0] < 1e-5 and moved[1] < 1e-5 and moved[2] > 1e-3


def test_the_closed_form_is_the_cheapest_change_towards_the_anchors_keys_and_values(tiny):
    """The gradient of `|X (W + dW)^T - Y W^T|^2 + ridge s^2 |dW|^2 + tr(dW G dW^T)` within the null space is zero there."""
    layers, scale, ridge = text_layers(tiny.unet), 0.5, 0.1
    basis = NullSpaceBasis.solve(tiny.encode_prompt(["", "Picasso"]), ["", "Picasso"], 1e-7, "svd", {})
    concept, anchor = tiny.encode_prompt(["VanGogh", "VanGogh painting"]), tiny.encode_prompt(["a photo of a church"])
    seen, wanted = concept.flatten(0, 1).double(), anchor.expand_as(concept).flatten(0, 1).double()
    for spared in (torch.zeros(96, 96, dtype=torch.float64), tiny.vocab_gram_without("VanGogh")):
        directions, cost = basis.directions(concept, None, ridge, 0.0, spared)
        shift = SeparableShift.closed_form(layers, directions, scale, concept, anchor, cost)
        size = torch.linalg.matrix_norm(seen @ torch.linalg.qr(basis.vectors.T).Q, ord=2) ** 2
        for name, layer in layers.items():
            delta, weight = shift.delta(f"{name}.weight"), layer.weight.double()
            missing = seen @ (weight + delta).T - wanted @ weight.T
            gradient = (missing.T @ seen + ridge * size * delta + delta @ spared) @ torch.linalg.qr(basis.vectors.T).Q
            assert gradient.norm() < 2e-3 * (missing.T @ seen).norm()  # directions below REACH are left out
            assert missing.norm() < (seen @ weight.T - wanted @ weight.T).norm()
    identity = torch.eye(96, dtype=torch.float64)
    exact = SeparableShift.closed_form(layers, identity, scale, concept, anchor, 1e-12 * identity)
    latents, step = torch.randn(1, *tiny.latent_shape), torch.tensor(500)
    with applied(tiny.unet, [exact]):
        moved = tiny.predict_noise(latents, step, concept[:1])
    assert torch.allclose(moved, tiny.predict_noise(latents, step, anchor), atol=1e-4)


def test_merging_adds_up_in_any_order_and_leaving_out_restores_every_bit(tiny):
    layers = text_layers(tiny.unet)
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
    layers = text_layers(tiny.unet)
    shift = random_shift(tiny, ["", "Picasso"])
    seen = {prompt: tiny.encode_prompt([prompt])[0] for prompt in ("Picasso", "VanGogh")}
    rows = {row["prompt"]: row["leak"] for row in leakage(layers, {"1": shift}, seen)}
    e = seen["VanGogh"].double()
    moved = sum((e @ shift.delta(f"{name}.weight").T).square().sum() for name in layers).sqrt()
    base = sum((e @ layer.weight.double().T).square().sum() for layer in layers.values()).sqrt()
    assert rows["Picasso"] < 1e-6 and rows["VanGogh"] == pytest.approx(float(moved / base))


def test_foreign_shifts_are_refused(tiny, tmp_path):
    layers, path = text_layers(tiny.unet), tmp_path / "s.safetensors"
    shift = random_shift(tiny, [""])
    shift.save(path, shift.metadata)
    with pytest.raises(ValueError, match="another base model"):
        WeightShift.load(path).check("0" * 64, tiny.unet)
    name = next(iter(shift.coefficients))
    shift.coefficients[name] = shift.coefficients[name][:3]
    shift.save(path, shift.metadata)
    with pytest.raises(ValueError, match="does not fit the model's layer"):
        WeightShift.load(path).check(tiny.digest, tiny.unet)
    shift.coefficients[name] = shift.coefficients[name][:, :3]
    shift.save(path, shift.metadata)
    with pytest.raises(ValueError, match="wrong names or shapes"):
        WeightShift.load(path)


def test_a_dense_shift_is_what_leads_to_the_trained_weights(tiny, tmp_path):
    names = trainable_parameter_names(tiny.unet, "full")[:4]
    student = {name: tiny.unet.get_parameter(name) + (0 if k == 1 else 1) for k, name in enumerate(names)}
    shift = DenseShift.from_weights(tiny.unet, student)
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
