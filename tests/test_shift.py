"""Weight shifts: what they change, how they add up, and what of a file is believed."""

import pytest
import torch
from conftest import NamedModel

from ldm.diffusion.text_layers import text_layers
from ldm.diffusion.trainable import trainable_parameter_names
from ldm.erasure.leakage import leakage
from ldm.erasure.merge import applied, merge
from ldm.erasure.null_space import NullSpaceBasis
from ldm.erasure.shift import DenseShift, SeparableShift, WeightShift


def random_shift(model, protected, seed=0, scale=0.5) -> SeparableShift:
    basis = NullSpaceBasis.fit(model.encode_prompt(protected), protected, 1e-7, "svd")
    generator = torch.Generator().manual_seed(seed)
    coefficients = {}
    for name, layer in text_layers(model.denoiser).items():
        coefficients[name] = torch.randn(layer.out_features, len(basis.vectors), generator=generator)
    metadata = {"base_digest": model.digest, "concept_index": seed, "scale": scale}
    return SeparableShift(coefficients, basis.vectors, scale, metadata)


def test_delta_is_the_definition_and_survives_a_file(tiny, tmp_path):
    shift = random_shift(tiny, ["", "Picasso"])
    name = shift.parameter_names[0]
    expected = shift.coefficients[name.removesuffix(".weight")].double() @ (0.5 * shift.directions)
    assert torch.equal(shift.delta_weight(name), expected)
    shift.save(tmp_path / "s.safetensors", shift.metadata)
    loaded = WeightShift.load(tmp_path / "s.safetensors")
    assert set(loaded.parameter_names) == set(shift.parameter_names)
    assert all(torch.equal(loaded.delta_weight(name), shift.delta_weight(name)) for name in shift.parameter_names)
    assert loaded.metadata["base_digest"] == tiny.digest and "torch" in loaded.metadata["versions"]


def test_a_shift_leaves_protected_prompts_alone_and_changes_the_output_of_others(tiny):
    shift = random_shift(tiny, ["", "Picasso"])
    latents, timestep = torch.randn(3, *tiny.latent_shape), torch.tensor(500)
    prompt_embeds = tiny.encode_prompt(["", "Picasso", "VanGogh"])
    before = tiny.predict_noise(latents, timestep, prompt_embeds)
    with applied(tiny.denoiser, [shift]):
        change = (tiny.predict_noise(latents, timestep, prompt_embeds) - before).abs().amax((1, 2, 3))
    assert change[0] < 1e-5 and change[1] < 1e-5 and change[2] > 1e-3


def test_merging_adds_up_in_any_order_and_leaving_out_restores_every_bit(tiny):
    layers = text_layers(tiny.denoiser)
    base = {name: layer.weight.clone() for name, layer in layers.items()}
    parameters = {name: layer.weight for name, layer in layers.items()}
    first, second = random_shift(tiny, [""], 1), random_shift(tiny, ["", "Cezanne"], 2)
    both = merge(tiny.denoiser, [first, second])
    reordered = merge(tiny.denoiser, [second, first])
    for name in layers:
        weight = f"{name}.weight"
        expected = base[name].double() + first.delta_weight(weight) + second.delta_weight(weight)
        assert torch.equal(both[weight], expected.float())
        assert torch.allclose(both[weight], reordered[weight], atol=1e-6)
    with pytest.raises(RuntimeError), applied(tiny.denoiser, [first, second]):
        assert torch.equal(next(iter(layers.values())).weight, next(iter(both.values())))
        raise RuntimeError
    for name, layer in layers.items():
        assert layer.weight is parameters[name] and torch.equal(layer.weight, base[name])
    assert merge(tiny.denoiser, []) == {}


def test_leakage_is_the_relative_change_of_what_the_text_layers_put_out(tiny):
    layers = text_layers(tiny.denoiser)
    shift = random_shift(tiny, ["", "Picasso"])
    embeds = {prompt: tiny.encode_prompt([prompt])[0] for prompt in ("Picasso", "VanGogh")}
    rows = {row["prompt"]: row["leakage"] for row in leakage(layers, {"1": shift}, embeds)}
    e = embeds["VanGogh"].double()
    change = sum((e @ shift.delta_weight(f"{name}.weight").T).square().sum() for name in layers).sqrt()
    base = sum((e @ layer.weight.double().T).square().sum() for layer in layers.values()).sqrt()
    assert rows["Picasso"] < 1e-6 and rows["VanGogh"] == pytest.approx(float(change / base))


def test_unfitting_shifts_are_refused(tiny, tmp_path):
    path = tmp_path / "s.safetensors"
    shift = random_shift(tiny, [""])
    shift.save(path, shift.metadata)
    with pytest.raises(ValueError, match="another base model"):
        WeightShift.load(path).check(NamedModel("0" * 64))
    name = next(iter(shift.coefficients))
    shift.coefficients[name] = shift.coefficients[name][:3]
    shift.save(path, shift.metadata)
    with pytest.raises(ValueError, match="does not fit the model's layer"):
        WeightShift.load(path).check(tiny)
    shift.coefficients[name] = shift.coefficients[name][:, :3]
    shift.save(path, shift.metadata)
    with pytest.raises(ValueError, match="wrong names, shapes or sizes"):
        WeightShift.load(path)


def test_a_dense_shift_is_what_leads_to_the_trained_weights(tiny, tmp_path):
    names = trainable_parameter_names(tiny.denoiser, "full")[:4]
    student = {name: tiny.denoiser.get_parameter(name) + (0 if k == 1 else 1) for k, name in enumerate(names)}
    shift = DenseShift.from_weights(tiny.denoiser, student)
    assert shift.parameter_names == [names[0], *names[2:]]  # what did not change is left out
    shift.save(tmp_path / "d.safetensors", {"base_digest": tiny.digest})
    loaded = WeightShift.load(tmp_path / "d.safetensors")
    loaded.check(tiny)
    base = {name: tiny.denoiser.get_parameter(name) for name in names}
    with applied(tiny.denoiser, [loaded]):
        for name, weight in student.items():
            assert torch.allclose(tiny.denoiser.get_parameter(name), weight, atol=1e-6)
    assert all(tiny.denoiser.get_parameter(name) is weight for name, weight in base.items())


def test_dense_and_separable_shifts_add_up(tiny):
    separable = random_shift(tiny, [""])
    name = separable.parameter_names[0]
    dense = DenseShift({name: torch.ones_like(separable.delta_weight(name))})
    expected = tiny.denoiser.get_parameter(name).double() + separable.delta_weight(name) + 1
    assert torch.equal(merge(tiny.denoiser, [separable, dense])[name], expected.float())


def test_a_dense_shift_of_another_model_is_refused(tiny, tmp_path):
    DenseShift({"conv_in.weight": torch.ones(2, 2)}).save(tmp_path / "d.safetensors", {"base_digest": tiny.digest})
    with pytest.raises(ValueError, match=r"conv_in\.weight does not fit"):
        WeightShift.load(tmp_path / "d.safetensors").check(tiny)


@pytest.mark.parametrize("kind", ["separable", "dense"])
def test_a_shift_that_is_held_does_not_become_what_is_written_into_its_file_later(tiny, tmp_path, kind):
    path, first, other = tmp_path / "s.safetensors", random_shift(tiny, [""], 1), random_shift(tiny, [""], 2)
    if kind == "dense":
        first = DenseShift({name: first.delta_weight(name) for name in first.parameter_names})
        other = DenseShift({name: other.delta_weight(name) for name in other.parameter_names})
    first.save(path, {"base_digest": tiny.digest})
    held, name = WeightShift.load(path), first.parameter_names[0]
    first.save(path, {"base_digest": tiny.digest})  # the same contents, in another file
    before = held.delta_weight(name)
    assert torch.equal(before, WeightShift.load(path).delta_weight(name))
    other.save(path, {"base_digest": tiny.digest})
    for read in (held.delta_weight, lambda name: held.fits(name, before)):
        with pytest.raises(ValueError, match=r"s\.safetensors was written anew, or removed, .*load it again"):
            read(name)
    smaller = DenseShift({other.parameter_names[-1]: torch.ones(2, 2)})
    smaller.save(path, {})  # which has no tensor of that name
    with pytest.raises(ValueError, match="written anew"):
        held.check(tiny)
    path.unlink()
    with pytest.raises(ValueError, match="removed"), applied(tiny.denoiser, [held]):
        pass
