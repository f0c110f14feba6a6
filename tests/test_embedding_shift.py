"""Shifts of embeddings: one change for every denoiser of a text encoder, merged in one step, small in its file."""

import hashlib
import shutil
from dataclasses import replace

import pytest
import torch
from conftest import CPU, NamedModel, make_xl
from diffusers import StableDiffusionPipeline
from safetensors import safe_open

from ldm import erase, export
from ldm.diffusion.load import load_model
from ldm.diffusion.load_text import load_text_model
from ldm.erasure import card_loader
from ldm.erasure.export_shift import _card, as_written
from ldm.erasure.leakage import leakage
from ldm.erasure.merge import SummedShifts, applied, edited, merge
from ldm.erasure.shift import DenseShift, EmbeddingShift, SeparableShift, WeightShift
from ldm.io.tensors import load_tensors, save_tensors


def random_shift(width: int, rank: int = 3, seed: int = 0) -> EmbeddingShift:
    generator = torch.Generator().manual_seed(seed)
    directions = torch.linalg.qr(torch.randn(width, rank, generator=generator, dtype=torch.float64)).Q.T
    return EmbeddingShift(torch.randn(width, rank, generator=generator), directions)


def test_it_is_the_separable_shift_with_w_a_for_every_layer(tiny):
    shift = random_shift(tiny.context_dim).on(tiny.text_layers)
    layers = tiny.text_layers
    coefficients = {name: layer.weight.double() @ shift.outputs for name, layer in layers.items()}
    separable = SeparableShift(coefficients, shift.directions, 1.0)
    assert shift.parameter_names == separable.parameter_names and shift.rank == 3
    for name in shift.parameter_names:
        assert torch.equal(shift.delta_weight(name), separable.delta_weight(name))
        assert shift.delta_weight(name).shape == separable.delta_weight(name).shape
    embeds = tiny.embed_prompts(["a dog", "VanGogh"])
    rows = zip(leakage(layers, {"": shift}, embeds), leakage(layers, {"": separable}, embeds), strict=True)
    assert all(own["leakage"] == pytest.approx(other["leakage"]) for own, other in rows)


def test_the_edited_layers_are_the_layers_on_edited_embeddings(tiny):
    shift, embeds = random_shift(tiny.context_dim), tiny.encode_prompt(["a dog"])[0]
    changed = embeds + (embeds.double() @ shift.embedding_change().T).float()
    before = {name: layer(changed) for name, layer in tiny.text_layers.items()}
    with applied(tiny.denoiser, [shift]):
        for name, layer in tiny.text_layers.items():
            assert torch.allclose(layer(embeds), before[name], rtol=1e-4, atol=1e-5)


def test_any_number_of_them_is_one_change_in_any_order_and_none_is_the_very_base(tiny, tmp_path):
    shifts = []
    for seed in range(20):
        random_shift(tiny.context_dim, seed=seed).save(tmp_path / f"{seed}.safetensors", {})
        shifts.append(WeightShift.load(tmp_path / f"{seed}.safetensors"))
    merged, base = (
        merge(tiny.denoiser, shifts),
        {name: value.clone() for name, value in tiny.denoiser.state_dict().items()},
    )
    total = sum((shift.embedding_change() for shift in shifts), torch.zeros(()))
    for name, weight in merged.items():
        expected = base[name].double() @ (torch.eye(tiny.context_dim).double() + total)
        assert torch.allclose(weight.double(), expected, rtol=1e-5, atol=1e-5)
    again = merge(tiny.denoiser, [WeightShift.load(shift.path) for shift in reversed(shifts)])
    assert all(torch.equal(again[name], weight) for name, weight in merged.items())
    one_out = merge(tiny.denoiser, shifts[1:])
    assert all(not torch.equal(one_out[name], weight) for name, weight in merged.items())
    with applied(tiny.denoiser, shifts):
        assert any(not torch.equal(value, base[name]) for name, value in tiny.denoiser.state_dict().items())
    assert all(torch.equal(value, base[name]) for name, value in tiny.denoiser.state_dict().items())


def test_it_adds_up_with_shifts_of_weights(tiny):
    shift, dense = random_shift(tiny.context_dim), DenseShift({"conv_in.weight": torch.ones(8, 4, 3, 3)})
    names = [f"{name}.weight" for name in tiny.text_layers]
    summed = SummedShifts([dense, shift], tiny.text_layers)
    assert summed.parameter_names == [*names, "conv_in.weight"]
    assert torch.equal(summed.merged(tiny.denoiser.conv_in.weight, "conv_in.weight"), tiny.denoiser.conv_in.weight + 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_it_survives_a_file_in_either_precision(tiny, tmp_path, dtype):
    shift, path = random_shift(tiny.context_dim), tmp_path / "s.safetensors"
    shift.rounded(dtype).save(path, {"text_digest": tiny.text_digest, "base_model": "tiny"})
    loaded = WeightShift.load(path)
    assert isinstance(loaded, EmbeddingShift) and loaded.rank == 3 and not loaded.parameter_names
    assert torch.equal(loaded.outputs, shift.outputs.to(dtype).double())
    assert torch.equal(loaded.directions, shift.directions.to(dtype).double())
    loaded.check(tiny)
    with pytest.raises(ValueError, match="another text encoder"):
        loaded.check(NamedModel(tiny.digest, context_dim=tiny.context_dim, text_digest="other"))
    with pytest.raises(ValueError, match="embeddings of 96 numbers, and the model's have 8"):
        loaded.check(NamedModel(text_digest=tiny.text_digest))
    assert loaded.on(tiny.text_layers).path == path


def test_a_file_of_other_shapes_is_refused(tmp_path):
    shift, path = random_shift(8), tmp_path / "s.safetensors"
    shift.outputs = shift.outputs[:, :2]
    shift.save(path, {})
    with pytest.raises(ValueError, match="wrong names, shapes or sizes"):
        WeightShift.load(path)
    shift.outputs = torch.full((8, 3), 1e31).double()
    with pytest.raises(ValueError, match="is not written: it would add"):
        shift.save(path, {})


def test_it_is_cut_as_the_separable_one_is(tiny):
    shift = random_shift(tiny.context_dim, 5).on(tiny.text_layers)
    separable = SeparableShift(dict(shift.coefficients), shift.directions, 1.0)
    for rank in (1, 3, 5):
        cut, expected = shift.truncate(rank), separable.truncate(rank)
        assert isinstance(cut, EmbeddingShift) and cut.rank == rank and cut.metadata["truncated_to_rank"] == rank
        for name in shift.parameter_names:
            assert torch.allclose(cut.delta_weight(name), expected.delta_weight(name), atol=1e-9)
    alone = random_shift(tiny.context_dim, 5).truncate(2)  # the nearest of that rank, in embeddings
    values = torch.linalg.svdvals(shift.embedding_change())
    difference = (alone.embedding_change() - shift.embedding_change()).norm()
    assert float(difference) == pytest.approx(float(values[2:].norm()))


def test_a_text_encoder_is_read_without_a_denoiser(tiny, tiny_path, tmp_path):
    alone = load_text_model(tiny_path, CPU)
    assert alone.text_digest == tiny.text_digest and not alone.digests and alone.context_dim == tiny.context_dim
    assert torch.equal(alone.encode_prompt(["a dog"]), tiny.encode_prompt(["a dog"]))
    assert not hasattr(alone, "unet") and alone.pipeline.vae is None
    (tmp_path / "bare").mkdir()
    for part in ("text_encoder", "tokenizer"):
        for path in (tiny_path / part).iterdir():
            (tmp_path / "bare" / path.name).write_bytes(path.read_bytes())
    assert load_text_model(tmp_path / "bare", CPU).text_digest == tiny.text_digest
    assert load_model(tiny_path, CPU).text_digest == tiny.text_digest


@pytest.fixture(scope="module")
def shared(tiny_path, tmp_path_factory):
    """A tiny model, and a folder with the file, the card and the rest of a shift with a gate, in float16."""
    folder = tmp_path_factory.mktemp("shared")
    model = load_model(tiny_path, CPU)
    few = {
        "retain_captions": 20,
        "retain_words": 10,
        "compositions": 5,
        "word_lists": 5,
        "misspellings": 0,
        "gate": True,
    }
    shifts = erase(model, "VanGogh", protect="a dog", artifacts_dir=folder / "made", ridge_weight=1e-6, **few)
    export(model, shifts, folder / "out", "shift", save_dtype="float16", rank=1)
    return model, shifts["vangogh"], folder / "out-shift"


def test_what_a_shared_file_says_does_not_depend_on_what_is_exported_with_it(shared, tmp_path):
    """The shift is measured on the base model, and not on the weights that are merged for the other formats."""
    model, shift, folder = shared
    before = WeightShift.load(folder / "VanGogh.safetensors").metadata
    export(model, {"vangogh": shift}, tmp_path / "out", ["diffusers", "shift"], save_dtype="float16", rank=1)
    after = WeightShift.load(tmp_path / "out-shift" / "VanGogh.safetensors").metadata
    for name in ("effects", "target_change", "max_leakage_protected"):
        assert after[name] == before[name]


def test_a_shared_file_is_small_and_says_what_is_long_beside_it(shared):
    model, shift, folder = shared
    assert sorted(path.name for path in folder.glob("VanGogh*")) == [
        f"VanGogh.{end}" for end in ("json", "md", "safetensors")
    ]
    path = folder / "VanGogh.safetensors"
    loaded = WeightShift.load(path)
    loaded.check(model)
    assert loaded.rank == 1 and loaded.gated is not None and loaded.metadata["protected"] == shift.metadata["protected"]
    assert set(loaded.metadata["effects"]) == {"linear", "gated"} and loaded.metadata["max_leakage_protected"] < 0.01
    with safe_open(path, "pt") as opened:
        header = opened.metadata()["srs-me"]
    assert len(header) < 1500 and "captions" not in header
    beside = path.with_suffix(".json")
    whole = beside.read_text()
    beside.write_text(whole + " ")
    with pytest.raises(ValueError, match="is not what was written beside VanGogh"):
        WeightShift.load(path)
    save_tensors(folder / "other.safetensors", {"x": torch.zeros(1)}, "thing", {}, beside={"b": 1})
    assert load_tensors(folder / "other.safetensors", "thing")[1]["b"] == 1
    text = "[1]"
    (folder / "other.json").write_text(text)
    digest = hashlib.sha256(text.encode()).hexdigest()
    save_tensors(folder / "other.safetensors", {"x": torch.zeros(1)}, "thing", {"beside": digest})
    with pytest.raises(ValueError, match="holds no metadata"):
        load_tensors(folder / "other.safetensors", "thing")
    beside.unlink()
    assert "protected" not in WeightShift.load(path).metadata
    beside.write_text(whole)


def test_the_loader_in_the_card_does_what_this_program_does(shared, tiny_path, tmp_path):
    model, _, folder = shared
    path = folder / "VanGogh.safetensors"
    blocks = path.with_suffix(".md").read_text().split("```python\n")
    code = blocks[2].split("```")[0]
    assert len(code.splitlines()) < 80 and len(blocks[1].split("```")[0].splitlines()) == 5
    module: dict = {}
    exec(code, module)  # of our own card, as its reader would run it
    pipe = StableDiffusionPipeline.from_pretrained(tiny_path)
    taken = {"": WeightShift.load(path)}
    embeds, latents = model.encode_prompt(["a dog", "VanGogh"]), torch.randn(2, *model.latent_shape)
    timestep = torch.tensor(3)
    unedited = pipe.unet(latents, timestep, embeds).sample
    restore = module["erase"](pipe, str(path), gated=False)
    with applied(model.denoiser, list(taken.values())):
        expected = model.denoiser(latents, timestep, embeds).sample
    assert torch.allclose(pipe.unet(latents, timestep, embeds).sample, expected, rtol=1e-4, atol=1e-5)
    again = shutil.copy(path, tmp_path / "again.safetensors")
    restore_again = module["erase"](pipe, str(again), gated=False)
    assert not torch.allclose(pipe.unet(latents, timestep, embeds).sample, expected, rtol=1e-4, atol=1e-5)
    restore()  # in any order
    assert torch.allclose(pipe.unet(latents, timestep, embeds).sample, expected, rtol=1e-4, atol=1e-5)
    restore_again()
    assert torch.equal(pipe.unet(latents, timestep, embeds).sample, unedited)
    prompts = ["a dog", "VanGogh", "a cat"]
    before = pipe.encode_prompt(prompts, "cpu", 2, True)
    restore = module["erase"](pipe, str(path))
    after = pipe.encode_prompt(prompts, "cpu", 2, True, ["a dog", "a dog", "VanGogh"])
    with edited(model, taken, "gated"):
        embeds = model.encode_prompt(prompts)
    assert torch.allclose(after[0][::2], embeds, atol=1e-5) and torch.equal(after[0][1::2], after[0][::2])
    assert torch.equal(after[0][0], before[0][0]) and not torch.allclose(after[0][2], before[0][2], atol=1e-3)
    assert torch.allclose(after[1][4], embeds[1], atol=1e-5) and torch.equal(after[1][0], before[0][0])
    second = module["erase"](pipe, str(again))  # which leaves the first in place
    assert torch.equal(pipe.encode_prompt(["a dog"], "cpu", 1, False)[0], before[0][:1])
    restore()
    assert torch.equal(pipe.encode_prompt(prompts, "cpu", 2, True)[0], after[0])
    second()
    assert torch.equal(pipe.encode_prompt(prompts, "cpu", 2, False)[0], before[0])


@pytest.mark.parametrize(
    ("effects", "title"),
    [
        ({"linear": 0.9, "gated": 0.9}, "# VanGogh, erased from what tiny draws"),
        ({"linear": 0.9, "gated": 0.1}, "# VanGogh, erased by the weights alone from what tiny draws"),
        ({"linear": 0.1, "gated": 0.1}, "# VanGogh, a shift too weak to erase it, for what tiny draws"),
    ],
)
def test_the_card_calls_erased_what_was_measured_to_be(shared, tmp_path, effects, title):
    model, shift, _ = shared
    said = {form: {"mean": mean, "least": mean, "lowest_prompt": "x"} for form, mean in effects.items()}
    path = tmp_path / "it's.safetensors"
    path.touch()
    rounded = as_written(shift, torch.float16)
    metadata = shift.metadata | {"effects": said, "prompt": "Georgia O'Keeffe", "base_model": "tiny"}
    metadata["config"] = metadata["config"] | {"anchor": "empty"}
    card = _card(path, rounded, metadata, torch.float16, model)
    assert card.startswith(title)
    assert "| what takes its place | nothing: the empty prompt (by the weights), an artist (by the gate) |" in card
    assert """--prompts 'Georgia O'"'"'Keeffe'""" in card and """pipe("Georgia O'Keeffe")""" in card
    gate = next(iter(rounded.gated.gates.values()))
    rounded.gated = replace(rounded.gated, gates=dict.fromkeys(("text_encoder", "text_encoder_2"), gate))
    card = _card(path, rounded, metadata, torch.float16, load_model(make_xl(tmp_path / "xl"), CPU))
    assert ", gated=False)" in card and "StableDiffusionXLPipeline.from_pretrained" in card
    assert "In a StableDiffusionXLPipeline it erases by its change of weights: its gate needs this program." in card


def test_the_loader_in_the_card_refuses_the_gates_of_two_text_encoders(shared, tiny_path, tmp_path):
    rounded = as_written(shared[1], torch.float16)
    gate = next(iter(rounded.gated.gates.values()))
    names = ("text_encoder", "text_encoder_2")
    rounded.gated = replace(rounded.gated, gates=dict.fromkeys(names, gate), layers=dict.fromkeys(names, 0))
    tensors = rounded.tensors(torch.float16, {}) | rounded.gated.tensors(torch.float16)
    header = {"gate": {"layers": rounded.gated.layers}}
    save_tensors(tmp_path / "two.safetensors", tensors, "shift", header)
    pipe = StableDiffusionPipeline.from_pretrained(tiny_path)
    with pytest.raises(ValueError, match="give gated=False"):
        card_loader.erase(pipe, str(tmp_path / "two.safetensors"))


def test_a_rounded_shift_is_as_its_file_has_it_and_is_summed_up_as_such(shared, tmp_path):
    model, shift, _ = shared
    maps = {"tokens": replace(shift.gated.maps["tokens"], outputs=shift.gated.maps["tokens"].outputs + 1e-5)}
    given = WeightShift.load(shift.path).on(model.text_layers)
    given.gated = replace(given.gated, maps=maps)  # as of an older version, in float32
    rounded = as_written(given, torch.float16)
    tensors = rounded.gated.tensors(torch.float16)
    assert torch.equal(tensors["map.tokens.outputs"].double(), rounded.gated.maps["tokens"].outputs)
    layers = model.text_layers
    whole, half = (SummedShifts([each], layers) for each in (given, rounded))
    name, layer = next(iter(layers.items()))
    weight = layer.weight.detach()
    expected = weight.double() @ (torch.eye(len(rounded.outputs)) + rounded.embedding_change())
    found = half.merged(weight, f"{name}.weight")
    assert torch.allclose(found.double(), expected, atol=1e-7)
    assert not torch.equal(found, whole.merged(weight, f"{name}.weight"))


def test_a_trained_shift_and_a_half_that_files_do_not_have_are_not_shared(tiny, tmp_path):
    shift = random_shift(tiny.context_dim).on(tiny.text_layers)
    separable = SeparableShift(dict(shift.coefficients), shift.directions, 1.0)
    with pytest.raises(ValueError, match="no other takes it: make it again in closed form"):
        as_written(separable, torch.float16)
    with pytest.raises(ValueError, match="written in float32 or float16"):
        as_written(shift, torch.bfloat16)
