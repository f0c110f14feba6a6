"""Every format, read back by the program that it is for, generates what the merged model generates."""

import pytest
import torch
from conftest import CPU, compvis_config
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from pytorch_lightning.callbacks import ModelCheckpoint
from safetensors.torch import load_file, save_file

from ldm.config.methods import LINEAR_FORMATS, ExportConfig
from ldm.diffusion.compvis import EMA_PREFIX, UNET_PREFIX, convert_to_compvis, load_compvis_state_dict, unet_key_map
from ldm.diffusion.load import load_model
from ldm.diffusion.text_layers import text_layers
from ldm.erasure.export import (
    export,
    merged_and_cast,
    save_compvis,
    save_diffusers,
    save_kohya,
    save_lora,
    save_unet,
    truncate_shifts,
)
from ldm.erasure.leakage import leakage_after_rounding, leakage_table, truncation_error
from ldm.erasure.merge import applied, merge
from ldm.erasure.null_space import NullSpaceBasis
from ldm.erasure.shift import DenseShift, SeparableShift
from ldm.io.files import METADATA_FILE, read_dir_metadata

PROTECTED = ["", "Picasso"]
SAVERS = {
    "diffusers": save_diffusers,
    "unet": save_unet,
    "compvis": save_compvis,
    "lora": save_lora,
    "kohya": save_kohya,
}


def make_shift(model, concept: str, seed: int) -> SeparableShift:
    """Return a shift of coefficients large enough to be seen in an image."""
    basis = NullSpaceBasis.fit(model.encode_prompt(PROTECTED), PROTECTED, 1e-7, "svd")
    shift = SeparableShift.zeros(text_layers(model.denoiser), basis.vectors[:12], 2.0)
    generator = torch.Generator().manual_seed(seed)
    for weight in shift.coefficients.values():
        weight.data = torch.randn(weight.shape, generator=generator)
    captions = [f"{concept} painting"]
    shift.metadata = {"concept": concept, "prompt": concept, "captions": captions, "protected": PROTECTED}
    return shift


@pytest.fixture
def shifts(tiny):
    return {"1": make_shift(tiny, "VanGogh", 1), "2": make_shift(tiny, "Jackson Pollock", 2)}


def compvis_tensors(model) -> dict[str, torch.Tensor]:
    tensors = convert_to_compvis(model.denoiser.state_dict(), model.vae.state_dict(), model.text_encoder.state_dict())
    return {name: value.contiguous() for name, value in tensors.items()}


def ema_key(name: str) -> str:
    """Return what the moving average of a U-Net's tensor is called."""
    return EMA_PREFIX + name.removeprefix("model.").replace(".", "")


def generate(pipeline) -> torch.Tensor:
    """Return the pixels, 0 to 255, of two prompts by diffusers' own pipeline in float32."""
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    options = {"num_inference_steps": 4, "guidance_scale": 3.0, "output_type": "pt"}
    return pipeline(["VanGogh", "Jackson Pollock"], latents=noise, **options).images * 255


def diffusers_pipeline(path) -> StableDiffusionPipeline:
    return StableDiffusionPipeline.from_pretrained(path, dtype=torch.float32, safety_checker=None)


def expected_images(path, shifts) -> tuple[torch.Tensor, torch.Tensor]:
    """Return images of the base model, and with the shifts merged."""
    pipeline = diffusers_pipeline(path)
    base = generate(pipeline)
    with applied(pipeline.unet, list(shifts.values())):
        return base, generate(pipeline)


def is_close(images: torch.Tensor, expected: torch.Tensor, base: torch.Tensor) -> bool:
    assert (expected - base).abs().max() > 20, "the shifts must be seen for the comparison to mean anything"
    return (images - expected).abs().max() <= 2


def save_merged(model, shifts, folder, dtype) -> dict[str, torch.Tensor]:
    """Write all layouts of merged weights, one after the other as `export` writes them; return what was merged."""
    merged = merge(model.denoiser, list(shifts.values()), dtype)
    for name in ("diffusers", "unet", "compvis"):
        (folder / name).mkdir()
        with merged_and_cast(model, merged, dtype):
            SAVERS[name](model, shifts, folder / name, dtype)
    return merged


def test_merged_weights_are_rounded_once_in_every_layout(tiny, shifts, tmp_path):
    for layer in text_layers(tiny.denoiser).values():
        layer.weight.data *= 1.0001  # the tiny model's own weights are float16 numbers, which rounding leaves alone
    merged = save_merged(tiny, shifts, tmp_path, torch.float16)
    rounded_twice = merge(tiny.denoiser, list(shifts.values()))  # the base has been rounded by now
    assert any(not torch.equal(rounded_twice[name], weight) for name, weight in merged.items())
    keys = unet_key_map(tiny.denoiser.state_dict())
    files = {
        "diffusers": "unet/diffusion_pytorch_model.safetensors",
        "unet": "diffusion_pytorch_model.safetensors",
        "compvis": "model.safetensors",
    }
    for layout, file in files.items():
        written = load_file(tmp_path / layout / file)
        for name, weight in merged.items():
            assert torch.equal(written[keys[name] if layout == "compvis" else name], weight)


def test_whole_models_generate_what_the_merged_model_generates(tiny_path, shifts, tmp_path):
    base, expected = expected_images(tiny_path, shifts)
    save_merged(load_model(tiny_path, CPU), shifts, tmp_path, torch.float32)
    assert is_close(generate(diffusers_pipeline(tmp_path / "diffusers")), expected, base)
    pipeline = diffusers_pipeline(tiny_path)
    pipeline.unet = UNet2DConditionModel.from_pretrained(tmp_path / "unet")
    assert is_close(generate(pipeline), expected, base)
    checkpoint = tmp_path / "compvis" / "model.safetensors"
    loaded = load_model(checkpoint, CPU, compvis_config(tiny_path, tmp_path))
    assert is_close(generate(loaded.pipeline), expected, base)


@pytest.mark.parametrize("name", ["lora", "kohya"])
def test_loras_erase_and_restore_by_name(name, tiny, tiny_path, shifts, tmp_path):
    base, both = expected_images(tiny_path, shifts)
    _, second = expected_images(tiny_path, {"2": shifts["2"]})
    SAVERS[name](tiny, shifts, tmp_path, torch.float32)
    pipeline = diffusers_pipeline(tiny_path)
    for adapter, file in (("VanGogh", "1-VanGogh.safetensors"), ("Pollock", "2-Jackson-Pollock.safetensors")):
        pipeline.load_lora_weights(tmp_path, weight_name=file, adapter_name=adapter)
    pipeline.set_adapters(["VanGogh", "Pollock"])
    assert is_close(generate(pipeline), both, base)
    pipeline.set_adapters(["Pollock"])
    assert is_close(generate(pipeline), second, base)
    pipeline.disable_lora()
    assert torch.equal(generate(pipeline), base)


def test_kohya_alpha_is_the_rank(tiny, shifts, tmp_path):
    save_kohya(tiny, shifts, tmp_path, torch.float16)
    written = load_file(tmp_path / "1-VanGogh.safetensors")
    assert all(value == 12 for name, value in written.items() if name.endswith(".alpha"))
    assert all(value.dtype == torch.float16 for value in written.values())
    assert "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k.lora_down.weight" in written


def test_a_model_goes_to_compvis_layout_and_back_bit_for_bit(tiny, tiny_path, tmp_path):
    save_file(compvis_tensors(tiny), tmp_path / "tiny.safetensors")
    back = load_model(tmp_path / "tiny.safetensors", CPU, compvis_config(tiny_path, tmp_path))
    assert back.digest == tiny.digest and back.name == "tiny"
    for part, other in ((tiny.denoiser, back.denoiser), (tiny.vae, back.vae), (tiny.text_encoder, back.text_encoder)):
        weights, others = part.state_dict(), other.state_dict()
        assert weights.keys() == others.keys() and all(torch.equal(weights[name], others[name]) for name in weights)


@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
def test_only_the_changed_keys_of_the_original_checkpoint_change(suffix, tiny, tiny_path, shifts, tmp_path):
    """With its moving averages, and what is no part of the model."""
    tensors = {name: value.half() for name, value in compvis_tensors(tiny).items()}
    keys = unet_key_map(tiny.denoiser.state_dict())
    averages = {ema_key(name): tensors[name] + 1 for name in keys.values()}
    tensors |= {"betas": torch.arange(5.0), "steps": torch.tensor(7)} | averages
    path = tmp_path / f"base{suffix}"
    if suffix == ".ckpt":  # with what Lightning keeps in the original files
        torch.save({"state_dict": tensors, "callbacks": {ModelCheckpoint: {"best_model_path": ""}}}, path)
    else:
        save_file(tensors, path)
    model = load_model(path, CPU, compvis_config(tiny_path, tmp_path))
    save_compvis(model, shifts, tmp_path, torch.float32)
    written, before = load_compvis_state_dict(tmp_path / f"model{suffix}"), load_compvis_state_dict(path)
    assert written.keys() == before.keys()
    changed = {name for name in written if not torch.equal(written[name], before[name])}
    expected = set()
    for shift in shifts.values():
        expected |= {keys[name] for name in shift.parameter_names}
    assert changed == expected | {ema_key(name) for name in expected}
    merged = merge(model.denoiser, list(shifts.values()), torch.float16)
    assert all(torch.equal(written[keys[name]], weight) for name, weight in merged.items())


def test_keys_are_those_of_stable_diffusion_v1():
    with torch.device("meta"):
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
    keys = unet_key_map(unet.state_dict())
    assert len(set(keys.values())) == 686
    blocks = ["middle_block", *(f"input_blocks.{n}" for n in (1, 2, 4, 5, 7, 8))]
    blocks += [f"output_blocks.{n}" for n in range(3, 12)]
    expected = set()
    for block in blocks:
        expected |= {f"{block}.1.transformer_blocks.0.attn2.to_{part}.weight" for part in "kv"}
    assert {keys[f"{layer}.weight"].removeprefix(UNET_PREFIX) for layer in text_layers(unet)} == expected
    assert keys["up_blocks.1.upsamplers.0.conv.weight"] == f"{UNET_PREFIX}output_blocks.5.2.conv.weight"
    assert keys["up_blocks.0.upsamplers.0.conv.bias"] == f"{UNET_PREFIX}output_blocks.2.1.conv.bias"
    assert keys["down_blocks.2.downsamplers.0.conv.bias"] == f"{UNET_PREFIX}input_blocks.9.0.op.bias"
    shortcut = "input_blocks.4.0.skip_connection.weight"
    assert keys["down_blocks.1.resnets.0.conv_shortcut.weight"] == f"{UNET_PREFIX}{shortcut}"


def test_a_truncated_shift_is_the_best_of_its_rank_and_keeps_the_null_space(tiny, shifts):
    shift, protected_rows = shifts["1"], tiny.encode_prompt(PROTECTED).flatten(0, 1).double()
    stacked = torch.cat([shift.delta_weight(name) for name in shift.parameter_names])
    for rank in (1, 3, 12):
        truncated = shift.truncate(rank)
        error = stacked - torch.cat([truncated.delta_weight(name) for name in truncated.parameter_names])
        assert truncated.directions.shape == (rank, 96)
        assert torch.allclose(error.norm() ** 2, (torch.linalg.svdvals(stacked)[rank:] ** 2).sum(), atol=1e-8)
        assert (protected_rows @ truncated.directions.T).abs().max() < 1e-5
    embeds = tiny.encode_prompt(["VanGogh"])[0]
    errors = [truncation_error(shift, shift.truncate(rank), embeds) for rank in (12, 4, 1)]
    assert errors[0] < 1e-10 < errors[1] < errors[2] < 1


def test_the_automatic_rank_is_the_lowest_that_keeps_the_effect_fraction(tiny, shifts):
    config = ExportConfig(rank="auto", effect_fraction=0.5, save_dtype="float16")
    truncated, rows = truncate_shifts(tiny, shifts, config)
    for (label, shift), row in zip(shifts.items(), rows, strict=True):
        embeds = tiny.encode_prompt([shift.metadata["prompt"], *shift.metadata["captions"]]).flatten(0, 1)
        assert row["rank"] == len(truncated[label].directions) > 1
        error = truncation_error(shift, truncated[label], embeds)
        assert row["truncation_error"] == error <= 0.5
        assert truncation_error(shift, shift.truncate(row["rank"] - 1), embeds) > 0.5
        assert row["max_leakage_protected"] < 1e-2
    with pytest.raises(ValueError, match="`effect_fraction` 0"):
        ExportConfig(rank="auto", effect_fraction=0.0)
    with pytest.raises(ValueError, match="no rank"):
        truncate_shifts(tiny, {"1": DenseShift({"a": torch.ones(2, 2)})}, ExportConfig(rank=1, save_dtype="float16"))


def test_leakage_after_rounding_is_that_of_the_weights_as_written(tiny, shifts):
    layers, embeds = text_layers(tiny.denoiser), {"": tiny.encode_prompt([""])[0]}
    exact, half = (
        leakage_after_rounding(layers, merge(tiny.denoiser, list(shifts.values()), dtype), embeds)[""]
        for dtype in (torch.float64, torch.float16)
    )
    assert exact < 1e-5 < half < 1e-2


def test_many_shifts_leakage_is_summed_up_by_the_prompts_own_and_the_max_of_the_others(tiny, shifts):
    layers, embeds = text_layers(tiny.denoiser), tiny.embed_prompts(["VanGogh", "Jackson Pollock", "Picasso"])
    each = leakage_table(layers, shifts, embeds)
    summary = leakage_table(layers, shifts, embeds, columns=1)
    own = {"VanGogh": each.loc["VanGogh", "1"], "Jackson Pollock": each.loc["Jackson Pollock", "2"]}
    assert summary["its own shift"].dropna().to_dict() == own
    assert summary["which"].to_dict() == {
        "VanGogh": "2",
        "Jackson Pollock": "1",
        "Picasso": each.loc["Picasso"].idxmax(),
    }
    assert summary.loc["VanGogh", "max of the others"] == each.loc["VanGogh", "2"]


def test_an_export_writes_every_format_once_and_measures_it(tiny, tiny_path, shifts, tmp_path):
    config = ExportConfig(LINEAR_FORMATS, "float16", rank=3)
    output, prompts = tmp_path / "tiny-12", ["", "VanGogh"]
    result = export(tiny, shifts, output, config, prompts)
    names = [output if name == "diffusers" else tmp_path / f"tiny-12-{name}" for name in LINEAR_FORMATS]
    assert result.targets == names and all((target / METADATA_FILE).is_file() for target in names)
    assert [row["rank"] for row in result.truncated] == [3, 3] and {row["of"] for row in result.truncated} == {12}
    assert list(result.leakage) == ["1", "2", "all, in float16"] and list(result.leakage.index) == prompts
    metadata = read_dir_metadata(output)
    assert metadata["created_by"] == "srs-me" and metadata["base_digest"] == tiny.digest
    assert list(metadata["merged"]) == ["1", "2"] and metadata["dtype"] == "torch.float16"
    written = {target: (target / METADATA_FILE).stat().st_mtime_ns for target in names}
    fresh = load_model(tiny_path, CPU)  # of the first model rounded weights are left
    export(fresh, shifts, output, config, prompts)
    assert {target: (target / METADATA_FILE).stat().st_mtime_ns for target in names} == written
    with pytest.raises(ValueError, match="another run made"):
        export(load_model(tiny_path, CPU), {"1": shifts["1"]}, output, config, prompts)
