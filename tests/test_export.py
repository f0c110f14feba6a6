"""Every format, read back by the program that it is for, draws what the merged model draws."""

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from pytorch_lightning.callbacks import ModelCheckpoint
from safetensors.torch import load_file, save_file

from ldm.diffusion.text_layers import text_layers
from ldm.diffusion.compvis import convert_to_compvis, load_compvis_state_dict, unet_key_map
from ldm.erasure.export import FORMATS, merged_and_cast, truncate_shifts
from ldm.erasure.leakage import leakage_table
from ldm.diffusion.load import load_model
from ldm.erasure.null_space import NullSpaceBasis
from ldm.erasure.leakage import leakage_after_rounding, truncation_error
from ldm.erasure.merge import applied, merge
from ldm.erasure.shift import DenseShift, SeparableShift

from conftest import CPU, compvis_config

PROTECTED = ["", "Picasso"]


def make_shift(model, concept: str, seed: int) -> SeparableShift:
    """Of coefficients large enough to be seen in a picture."""
    basis = NullSpaceBasis.solve(model.encode_prompt(PROTECTED), PROTECTED, 1e-7, "svd", {})
    shift = SeparableShift.zeros(text_layers(model.unet), basis.vectors[:12], 2.0)
    generator = torch.Generator().manual_seed(seed)
    for weight in shift.coefficients.values():
        weight.data = torch.randn(weight.shape, generator=generator)
    shift.metadata = {"concept": concept, "prompt": concept, "captions": [f"{concept} painting"], "protected": PROTECTED}
    return shift


@pytest.fixture
def shifts(tiny):
    return {"1": make_shift(tiny, "VanGogh", 1), "2": make_shift(tiny, "Jackson Pollock", 2)}


def compvis(model) -> dict[str, torch.Tensor]:
    tensors = convert_to_compvis(model.unet.state_dict(), model.vae.state_dict(), model.text_encoder.state_dict())
    return {name: value.contiguous() for name, value in tensors.items()}


def draw(pipeline) -> torch.Tensor:
    """Pixels 0 to 255 of two prompts, by diffusers' own pipeline in float32."""
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    made = pipeline(["VanGogh", "Jackson Pollock"], num_inference_steps=4, guidance_scale=3.0, latents=noise, output_type="pt")
    return made.images * 255


def diffusers_pipeline(path) -> StableDiffusionPipeline:
    return StableDiffusionPipeline.from_pretrained(path, dtype=torch.float32, safety_checker=None)


def expected(path, shifts) -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures of the base model, and with the shifts merged."""
    pipeline = diffusers_pipeline(path)
    base = draw(pipeline)
    with applied(pipeline.unet, list(shifts.values())):
        return base, draw(pipeline)


def close(pictures: torch.Tensor, wanted: torch.Tensor, base: torch.Tensor) -> bool:
    assert (wanted - base).abs().max() > 20, "the shifts must be seen for the comparison to mean anything"
    return (pictures - wanted).abs().max() <= 2


def write_merged(model, shifts, folder, dtype) -> dict[str, torch.Tensor]:
    """All layouts of merged weights, one after the other as the script writes them; returns what was merged."""
    merged = merge(model.unet, list(shifts.values()), dtype)
    for kind in ("diffusers", "unet", "compvis"):
        (folder / kind).mkdir()
        with merged_and_cast(model, merged, dtype):
            FORMATS[kind](model, shifts, folder / kind, dtype)
    return merged


def test_merged_weights_are_rounded_once_in_every_layout(tiny, shifts, tmp_path):
    for layer in text_layers(tiny.unet).values():
        layer.weight.data *= 1.0001  # the tiny model's own weights are float16 numbers, which rounding leaves alone
    merged = write_merged(tiny, shifts, tmp_path, torch.float16)
    twice = merge(tiny.unet, list(shifts.values()))  # the base has been rounded by now
    assert any(not torch.equal(twice[name], weight) for name, weight in merged.items())
    names = unet_key_map(tiny.unet.state_dict())
    for kind, file in (("diffusers", "unet/diffusion_pytorch_model.safetensors"), ("unet", "diffusion_pytorch_model.safetensors"),
                       ("compvis", "model.safetensors")):
        written = load_file(tmp_path / kind / file)
        assert all(torch.equal(written[names[name] if kind == "compvis" else name], weight) for name, weight in merged.items())


def test_whole_models_draw_what_the_merged_model_draws(tiny_path, shifts, tmp_path):
    base, wanted = expected(tiny_path, shifts)
    write_merged(load_model(tiny_path, CPU), shifts, tmp_path, torch.float32)
    assert close(draw(diffusers_pipeline(tmp_path / "diffusers")), wanted, base)
    pipeline = diffusers_pipeline(tiny_path)
    pipeline.unet = UNet2DConditionModel.from_pretrained(tmp_path / "unet")
    assert close(draw(pipeline), wanted, base)
    assert close(draw(load_model(tmp_path / "compvis" / "model.safetensors", CPU, compvis_config(tiny_path, tmp_path)).pipeline), wanted, base)


@pytest.mark.parametrize("kind", ["lora", "kohya"])
def test_loras_erase_and_restore_by_name(kind, tiny, tiny_path, shifts, tmp_path):
    base, wanted = expected(tiny_path, shifts)
    _, one = expected(tiny_path, {"2": shifts["2"]})
    FORMATS[kind](tiny, shifts, tmp_path, torch.float32)
    pipeline = diffusers_pipeline(tiny_path)
    for name, file in (("VanGogh", "1-VanGogh.safetensors"), ("Pollock", "2-Jackson-Pollock.safetensors")):
        pipeline.load_lora_weights(tmp_path, weight_name=file, adapter_name=name)
    pipeline.set_adapters(["VanGogh", "Pollock"])
    assert close(draw(pipeline), wanted, base)
    pipeline.set_adapters(["Pollock"])
    assert close(draw(pipeline), one, base)
    pipeline.disable_lora()
    assert torch.equal(draw(pipeline), base)


def test_kohya_alpha_is_the_rank(tiny, shifts, tmp_path):
    FORMATS["kohya"](tiny, shifts, tmp_path, torch.float16)
    made = load_file(tmp_path / "1-VanGogh.safetensors")
    assert all(value == 12 for name, value in made.items() if name.endswith(".alpha"))
    assert all(value.dtype == torch.float16 for value in made.values())
    assert "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k.lora_down.weight" in made


def test_a_model_goes_to_compvis_layout_and_back_bit_for_bit(tiny, tiny_path, tmp_path):
    save_file(compvis(tiny), tmp_path / "tiny.safetensors")
    back = load_model(tmp_path / "tiny.safetensors", CPU, compvis_config(tiny_path, tmp_path))
    assert back.digest == tiny.digest and back.name == "tiny"
    for part, other in ((tiny.unet, back.unet), (tiny.vae, back.vae), (tiny.text_encoder, back.text_encoder)):
        weights, others = part.state_dict(), other.state_dict()
        assert weights.keys() == others.keys() and all(torch.equal(weights[name], others[name]) for name in weights)


@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
def test_only_the_changed_keys_of_the_original_checkpoint_change(suffix, tiny, tiny_path, shifts, tmp_path):
    """With its moving averages, and what is no part of the model."""
    tensors = {name: value.half() for name, value in compvis(tiny).items()} | {"betas": torch.arange(5.0), "steps": torch.tensor(7)}
    names = unet_key_map(tiny.unet.state_dict())
    averages = {"model_ema." + name.removeprefix("model.").replace(".", ""): tensors[name] + 1 for name in names.values()}
    path = tmp_path / f"base{suffix}"
    if suffix == ".ckpt":  # with what Lightning keeps in the original files
        torch.save({"state_dict": tensors | averages, "callbacks": {ModelCheckpoint: {"best_model_path": ""}}}, path)
    else:
        save_file(tensors | averages, path)
    model = load_model(path, CPU, compvis_config(tiny_path, tmp_path))
    FORMATS["compvis"](model, shifts, tmp_path, torch.float32)
    made, before = load_compvis_state_dict(tmp_path / f"model{suffix}"), load_compvis_state_dict(path)
    assert made.keys() == before.keys()
    changed = {name for name in made if not torch.equal(made[name], before[name])}
    keys = {names[name] for shift in shifts.values() for name in shift.names}
    assert changed == keys | {"model_ema." + name.removeprefix("model.").replace(".", "") for name in keys}
    merged = merge(model.unet, list(shifts.values()), torch.float16)
    assert all(torch.equal(made[names[name]], weight) for name, weight in merged.items())


def test_names_are_those_of_stable_diffusion_v1():
    with torch.device("meta"):
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
    names = unet_key_map(unet.state_dict())
    assert len(set(names.values())) == 686
    start = "model.diffusion_model."
    assert {names[f"{layer}.weight"].removeprefix(start) for layer in text_layers(unet)} == {
        f"{block}.1.transformer_blocks.0.attn2.to_{part}.weight" for part in "kv"
        for block in ["middle_block", *(f"input_blocks.{n}" for n in (1, 2, 4, 5, 7, 8)), *(f"output_blocks.{n}" for n in range(3, 12))]}
    assert names["up_blocks.1.upsamplers.0.conv.weight"] == f"{start}output_blocks.5.2.conv.weight"
    assert names["up_blocks.0.upsamplers.0.conv.bias"] == f"{start}output_blocks.2.1.conv.bias"
    assert names["down_blocks.2.downsamplers.0.conv.bias"] == f"{start}input_blocks.9.0.op.bias"
    assert names["down_blocks.1.resnets.0.conv_shortcut.weight"] == f"{start}input_blocks.4.0.skip_connection.weight"


def test_a_cut_is_the_best_of_its_rank_and_keeps_the_null_space(tiny, shifts):
    shift, seen = shifts["1"], tiny.encode_prompt(PROTECTED).flatten(0, 1).double()
    stacked = torch.cat([shift.delta(name) for name in shift.names])
    for rank in (1, 3, 12):
        few = shift.cut(rank)
        left = stacked - torch.cat([few.delta(name) for name in few.names])
        assert few.directions.shape == (rank, 96)
        assert torch.allclose(left.norm() ** 2, (torch.linalg.svdvals(stacked)[rank:] ** 2).sum(), atol=1e-8)
        assert (seen @ few.directions.T).abs().max() < 1e-5
    own = tiny.encode_prompt(["VanGogh"])[0]
    assert truncation_error(shift, shift.cut(12), own) < 1e-10 < truncation_error(shift, shift.cut(4), own) < truncation_error(shift, shift.cut(1), own) < 1


def test_the_automatic_rank_is_the_lowest_that_keeps_the_share(tiny, shifts):
    few, rows = truncate_shifts(tiny, shifts, "auto", 0.5, torch.float16)
    for (label, shift), row in zip(shifts.items(), rows):
        own = tiny.encode_prompt([shift.metadata["prompt"], *shift.metadata["captions"]]).flatten(0, 1)
        assert row["rank"] == len(few[label].directions) > 1
        assert row["effect lost"] == truncation_error(shift, few[label], own) <= 0.5 < truncation_error(shift, shift.cut(row["rank"] - 1), own)
        assert row["moves protected"] < 1e-2
    with pytest.raises(ValueError, match="--share 0"):
        truncate_shifts(tiny, shifts, "auto", 0.0, torch.float16)
    with pytest.raises(ValueError, match="no rank"):
        truncate_shifts(tiny, {"1": DenseShift({"a": torch.ones(2, 2)})}, 1, 0.9, torch.float16)


def test_the_leak_after_rounding_is_that_of_the_weights_as_written(tiny, shifts):
    layers, seen = text_layers(tiny.unet), tiny.encode_prompt([""])[0]
    exact, half = (leakage_after_rounding(layers, merge(tiny.unet, list(shifts.values()), dtype), {"": seen})[""]
                   for dtype in (torch.float64, torch.float16))
    assert exact < 1e-5 < half < 1e-2


def test_many_shifts_leaks_are_summed_up_by_the_prompts_own_and_the_worst_of_the_others(tiny, shifts):
    layers, seen = text_layers(tiny.unet), tiny.seen(["VanGogh", "Jackson Pollock", "Picasso"])
    each = leakage_table(layers, shifts, seen)
    few = leakage_table(layers, shifts, seen, columns=1)
    assert few["its own shift"].dropna().to_dict() == {"VanGogh": each.loc["VanGogh", "1"], "Jackson Pollock": each.loc["Jackson Pollock", "2"]}
    assert few["which"].to_dict() == {"VanGogh": "2", "Jackson Pollock": "1", "Picasso": each.loc["Picasso"].idxmax()}
    assert few.loc["VanGogh", "most of the others"] == each.loc["VanGogh", "2"]
