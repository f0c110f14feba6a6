"""A model that is loaded is the one that its files say, as diffusers' pipelines read them, or is refused by name."""

import json
import shutil
import string
import warnings
from pathlib import Path

import pytest
import torch
from conftest import CPU, TINY, compvis_config, is_error, make_xl, styles
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertModel, BertTokenizer, modeling_utils

from ldm.config.concepts import get_concept
from ldm.config.methods import ExportConfig, NullSpaceConfig, SamplingConfig, SRSMEConfig
from ldm.diffusion.components import check_configs, check_index, read_config
from ldm.diffusion.compvis import convert_to_compvis, is_safetensors, unet_key_map
from ldm.diffusion.load import is_checkpoint, load_model, resolve_names
from ldm.diffusion.sampling import generate, initial_noise
from ldm.diffusion.text_layers import text_layers
from ldm.diffusion.tokenizer import vocabulary_words
from ldm.erasure.erase import erase
from ldm.erasure.export import export
from ldm.erasure.memory import estimate_memory
from ldm.erasure.merge import applied, merge
from ldm.erasure.protection import Protection
from ldm.erasure.shift import SeparableShift, WeightShift
from ldm.io.paths import REPO_ROOT, ArtifactPaths
from ldm.io.prompts import PromptCase
from ldm.io.tensors import save_tensors
from ldm.toy.train import save_pipeline

UNET, VAE, TEXT = "unet/config.json", "vae/config.json", "text_encoder/config.json"
TOKENIZER, SCHEDULER, INDEX = "tokenizer/tokenizer_config.json", "scheduler/scheduler_config.json", "model_index.json"
WEIGHTS = {
    "unet": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
}


def make_bert(folder: Path) -> Path:
    """Make a tiny random model whose text encoder is a BERT of 12 tokens, which splits words that it does not know."""
    torch.manual_seed(4)
    letters = list(string.ascii_lowercase)
    words = ["a", "an", "by", "painting", "photo", "of", "church", "artist", "van", "gogh", "##gogh", "picasso"]
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters), *words]
    vocabulary = {token: number for number, token in enumerate(dict.fromkeys(tokens))}
    tokenizer = BertTokenizer(vocab=vocabulary, model_max_length=12)
    width = TINY.unet.cross_attention_dim
    encoder_config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=width,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=32,
        initializer_range=0.2,  # so that prompts differ as those of a trained encoder do
    )
    unet = UNet2DConditionModel(**OmegaConf.to_container(TINY.unet))
    vae = AutoencoderKL(**OmegaConf.to_container(TINY.vae))
    save_pipeline(TINY, vae, unet, BertModel(encoder_config), tokenizer, folder)
    return folder


@pytest.fixture(scope="module")
def xl_path(tmp_path_factory) -> Path:
    return make_xl(tmp_path_factory.mktemp("models") / "xl")


@pytest.fixture(scope="module")
def bert_path(tmp_path_factory) -> Path:
    return make_bert(tmp_path_factory.mktemp("models") / "bert")


@pytest.fixture
def changed(tiny_path, tmp_path):
    """Copy a model with other values in one of its JSON files."""

    def copy(name: str, source: Path = tiny_path, **changes) -> Path:
        folder = tmp_path / f"copy{len(list(tmp_path.iterdir()))}"
        shutil.copytree(source, folder)
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
        return folder

    return copy


def refused(source, *words, **arguments) -> str:
    """Assert that a model is refused in one line with the words."""
    with pytest.raises(ValueError, match=r"\w") as caught:
        load_model(source, CPU, **arguments)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 1500, message
    for word in words:
        assert word in message, message
    return message


def decode_by_pipeline(pipeline, latents):
    """Return the images that a pipeline makes of clean latents."""
    pipeline.set_progress_bar_config(disable=True)
    pipeline.unet.forward = lambda sample, *_, **__: (torch.zeros_like(sample),)
    pipeline.scheduler.step = lambda output, timestep, sample, **_: (latents,)
    return pipeline("VanGogh", num_inference_steps=1, guidance_scale=1.0, latents=latents, output_type="pt").images


def test_latents_have_the_mean_and_deviation_of_the_config_as_in_xls_pipeline(changed, xl_path):
    statistics = {"latents_mean": [0.5, -1.0, 0.25, 2.0], "latents_std": [2.0, 0.5, 1.5, 3.0], "scaling_factor": 0.13}
    folder = changed(VAE, xl_path, **statistics)
    model, latents = load_model(folder, CPU), torch.randn(2, 4, 8, 8)
    pipeline = StableDiffusionXLPipeline.from_pretrained(folder, dtype=torch.float32, add_watermarker=False)
    expected = torch.cat([decode_by_pipeline(pipeline, latent[None]) for latent in latents])
    assert torch.allclose((model.decode(latents) / 2 + 0.5).clamp(0, 1), expected, atol=1e-5)
    plain = load_model(xl_path, CPU)
    assert not torch.allclose(plain.decode(latents), model.decode(latents), atol=1e-2)
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    unscaled = plain.encode_image(images) / plain.vae.config.scaling_factor
    mean, std = (torch.tensor(statistics[name]).view(1, 4, 1, 1) for name in ("latents_mean", "latents_std"))
    assert torch.allclose(model.encode_image(images), (unscaled - mean) * 0.13 / std, atol=1e-5)


def test_what_the_pipelines_leave_out_is_refused(changed, xl_path):
    statistics = {"latents_mean": [0.5, -1.0, 0.25, 2.0], "latents_std": [2.0, 0.5, 1.5, 3.0]}
    refused(changed(VAE, **statistics), VAE, "latents_mean", "not followed")
    refused(changed(VAE, shift_factor=0.7), VAE, "shift_factor", "not followed")
    refused(changed(VAE, xl_path, shift_factor=0.7), VAE, "shift_factor", "not followed")
    load_model(changed(VAE, shift_factor=None, force_upcast=False), CPU)


def test_without_any_of_that_latents_are_scaled_alone_to_the_last_bit(tiny):
    latents, images = torch.randn(1, *tiny.latent_shape), torch.rand(1, 3, 16, 16) * 2 - 1
    scale = tiny.vae.config.scaling_factor
    assert torch.equal(tiny.decode(latents), tiny.vae.decode(latents / scale).sample)
    assert torch.equal(tiny.encode_image(images), tiny.vae.encode(images).latent_dist.mean * scale)


@pytest.mark.parametrize(
    "changes", [{"latents_mean": [0, 0, 0, 0]}, {"latents_std": [1, 1, 1, 1]}, {"scaling_factor": 0}]
)
def test_half_of_the_statistics_is_refused(changed, changes):
    refused(changed(VAE, **changes), VAE, next(iter(changes)))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("time_cond_proj_dim", 8),
        ("class_embed_type", "timestep"),
        ("num_class_embeds", 3),
        ("addition_embed_type", "text"),
        ("addition_embed_type", "text_time"),
        ("encoder_hid_dim_type", "text_proj"),
        ("encoder_hid_dim", 96),
        ("only_cross_attention", True),
        ("only_cross_attention", [True, False]),
        ("mid_block_only_cross_attention", True),
        ("dual_cross_attention", True),
        ("cross_attention_norm", "layer_norm"),
        ("attention_type", "gated"),
        ("cross_attention_dim", [96, 32]),
        ("in_channels", 9),
        ("out_channels", 8),
        ("sample_size", None),
        ("sample_size", [8, 16]),
        ("down_block_types", ["SimpleCrossAttnDownBlock2D", "DownBlock2D"]),
        ("mid_block_type", "UNetMidBlock2DSimpleCrossAttn"),
        ("_class_name", "UNet2DModel"),
        ("quantization_config", {"quant_method": "bitsandbytes"}),
        ("auto_map", {"AutoModel": "harm.Harm"}),
    ],
)
def test_what_a_unet_would_do_otherwise_is_refused_by_its_field(changed, field, value):
    refused(changed(UNET, **{field: value}), UNET, field if field != "_class_name" else value)


def test_a_unet_without_cross_attention_is_refused(changed):
    blocks = {
        "down_block_types": ["DownBlock2D"] * 2,
        "mid_block_type": None,
        "up_block_types": ["UpBlock2D"] * 2,
    }
    refused(changed(UNET, **blocks), UNET, "no prompt")


def test_a_size_said_twice_is_that_size(changed, tiny):
    model = load_model(changed(UNET, sample_size=[8, 8], cross_attention_dim=[96, 96]), CPU)
    assert (model.image_size, model.latent_shape, model.context_dim) == (16, (4, 8, 8), 96)
    latents, timestep = torch.randn(1, 4, 8, 8), torch.tensor([3])
    embeds = tiny.encode_prompt(["VanGogh"])
    assert torch.equal(
        model.denoiser_output(latents, timestep, embeds), tiny.denoiser_output(latents, timestep, embeds)
    )
    assert load_model(changed(VAE, sample_size=64), CPU).image_size == 16  # the autoencoder's acts in tiles alone


def test_xl_without_its_sizes_and_a_refiner_are_refused(changed, xl_path):
    refused(changed(UNET, xl_path, addition_embed_type=None), UNET, "addition_embed_type")
    refused(changed("text_encoder_2/config.json", xl_path, projection_dim=16), "text_encoder_2")
    refused(changed(INDEX, xl_path, text_encoder=[None, None], tokenizer=[None, None]), INDEX, "text_encoder")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("vae", ["diffusers", "AutoencoderTiny"]),
        ("vae", ["diffusers", "AsymmetricAutoencoderKL"]),
        ("vae", ["diffusers", "VQModel"]),
        ("vae", ["diffusers", "ConsistencyDecoderVAE"]),
        ("unet", ["diffusers", "UNet2DModel"]),
        ("unet", "UNet2DConditionModel"),
        ("text_encoder", ["transformers", "T5EncoderModel"]),
        ("tokenizer", ["transformers", "AutoTokenizer"]),
        ("scheduler", ["diffusers", "FlowMatchEulerDiscreteScheduler"]),
        ("scheduler", ["diffusers", "EDMEulerScheduler"]),
        ("scheduler", ["diffusers", "UnCLIPScheduler"]),
        ("scheduler", ["diffusers", "NoScheduler"]),
        ("scheduler", ["os", "system"]),
        ("controlnet", ["diffusers", "ControlNetModel"]),
        ("harm", ["harm", "Harm"]),
    ],
)
def test_parts_of_other_classes_are_refused_by_name(changed, name, value):
    refused(changed(INDEX, **{name: value}), name, value[1] if isinstance(value, list) else value)


def test_a_scheduler_whose_package_is_missing_names_it(changed, monkeypatch):
    from diffusers.utils import dummy_torch_and_torchsde_objects

    dummy = dummy_torch_and_torchsde_objects.DPMSolverSDEScheduler
    monkeypatch.setattr("diffusers.DPMSolverSDEScheduler", dummy)
    refused(changed(INDEX, scheduler=["diffusers", "DPMSolverSDEScheduler"]), "DPMSolverSDEScheduler", "torchsde")


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"timestep_spacing": "random"}, "timestep_spacing"),
        ({"num_train_timesteps": 0}, "num_train_timesteps"),
        ({"num_train_timesteps": 10**9}, "num_train_timesteps"),
        ({"trained_betas": [0.1] * 30}, "num_train_timesteps"),
        ({"beta_start": 2.0, "beta_end": 3.0}, "betas"),
        ({"beta_start": "x"}, "scheduler"),
        ({"beta_schedule": "none"}, "none"),
        ({"use_flow_sigmas": True}, "use_flow_sigmas"),
        ({"prediction_type": "sample"}, "sample"),
        ({"prediction_type": "flow_prediction"}, "flow_prediction"),
        ({"algorithm_type": "x"}, "x"),
    ],
)
def test_a_schedulers_config_that_cannot_sample_is_refused(changed, changes, word):
    refused(changed(SCHEDULER, **changes), word)


def test_no_signal_at_the_end_is_for_velocities(changed):
    folder = changed(INDEX, scheduler=["diffusers", "DDIMScheduler"])
    path = folder / SCHEDULER
    config = json.loads(path.read_text()) | {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    path.write_text(json.dumps(config))
    refused(folder, "rescale_betas_zero_snr")
    path.write_text(json.dumps(config | {"prediction_type": "v_prediction"}))
    assert load_model(folder, CPU).scheduler.alphas_cumprod[-1] == 0


def test_the_trial_of_a_scheduler_takes_no_random_number(changed):
    folder = changed(INDEX, scheduler=["diffusers", "EulerAncestralDiscreteScheduler"])
    before = torch.get_rng_state()
    load_model(folder, CPU)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (UNET, ""),
        (UNET, "[1, 2]"),
        (VAE, "\xff\x00binary"),
        (TEXT, "null"),
        (INDEX, "[" * 10_000 + "]" * 10_000),
        (VAE, '{"a":' * 10_000 + "1" + "}" * 10_000),
        (SCHEDULER, '{"beta_end": 1e400}'),
        (SCHEDULER, '{"beta_end": NaN}'),
        (TEXT, '{"hidden_size": 96, "hidden_size": 97}'),
        (TOKENIZER, "[]"),
        (INDEX, '{"_class_name": 3}'),
    ],
)
def test_a_config_that_is_no_object_is_refused_by_its_file(tiny_path, tmp_path, name, text):
    shutil.copytree(tiny_path, tmp_path / "model")
    (tmp_path / "model" / name).write_bytes(text.encode("latin1"))
    refused(tmp_path / "model", name)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        (UNET, {"norm_num_groups": 0}),
        (UNET, {"sample_size": "x"}),
        (UNET, {"sample_size": True}),
        (UNET, {"sample_size": -8}),
        (UNET, {"attention_head_dim": 0}),
        (UNET, {"block_out_channels": []}),
        (UNET, {"block_out_channels": [8, 10**12]}),
        (UNET, {"layers_per_block": -1}),
        (UNET, {"layers_per_block": 10**9}),
        (UNET, {"in_channels": 4.0}),
        (VAE, {"norm_num_groups": 0}),
        (VAE, {"latent_channels": "x"}),
        (VAE, {"sample_size": {"a": 1}}),
        (VAE, {"block_out_channels": []}),
        (VAE, {"scaling_factor": "x"}),
        (VAE, {"scaling_factor": None}),
        (VAE, {"shift_factor": [1]}),
        (VAE, {"out_channels": 1}),
    ],
)
def test_numbers_that_no_model_has_are_refused_by_their_field(changed, name, changes):
    refused(changed(name, **changes), name, list(changes)[-1])


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        (UNET, {"norm_num_groups": 3}),
        (UNET, {"act_fn": "none"}),
        (UNET, {"down_block_types": ["CrossAttnDownBlock2D"]}),
        (UNET, {"norm_eps": "x"}),
        (UNET, {"num_attention_heads": 2}),
        (UNET, {"block_out_channels": [8, 32]}),
        (VAE, {"act_fn": []}),
        (VAE, {"down_block_types": []}),
        (VAE, {"layers_per_block": 2}),
        (VAE, {"mid_block_add_attention": False}),
        (TEXT, {"num_attention_heads": 0}),
        (TEXT, {"hidden_size": "x"}),
        (TEXT, {"hidden_act": "none"}),
        (TEXT, {"num_hidden_layers": 0}),
        (TEXT, {"num_hidden_layers": 2}),
        (TEXT, {"vocab_size": 0}),
        (TEXT, {"intermediate_size": 10**15}),
        (TEXT, {"layer_norm_eps": {}}),
    ],
)
def test_configs_that_do_not_fit_the_weights_are_refused(changed, name, changes):
    refused(changed(name, **changes))


def test_weights_without_a_tensor_or_with_one_too_many_are_refused(changed):
    for part in ("vae", "text_encoder"):
        folder = changed(INDEX)
        path = folder / part / WEIGHTS[part]
        tensors = load_file(path)
        name = next(name for name in sorted(tensors) if "norm" in name)
        save_file({key: value for key, value in tensors.items() if key != name}, path, metadata={"format": "pt"})
        refused(folder, name, "missing")


@pytest.mark.parametrize("name", ["tokenizer.json", "merges.txt"])
@pytest.mark.parametrize("text", ["", '{"version": "1.0"}', "\x00", "[" * 10_000])
def test_a_broken_tokenizer_is_refused(changed, name, text):
    folder = changed(INDEX)
    if name == "merges.txt":
        (folder / "tokenizer" / "tokenizer.json").unlink()
        (folder / "tokenizer" / "vocab.json").write_text(text)
    else:
        (folder / "tokenizer" / name).write_text(text)
    refused(folder)


def test_a_tokenizer_without_its_files_is_refused(changed):
    folder = changed(INDEX)
    for name in ("tokenizer.json", "vocab.json"):
        (folder / "tokenizer" / name).unlink()
    refused(folder, "vocab.json", "missing")


@pytest.mark.parametrize("length", [10**30, 1e30, 100, None])
def test_a_tokenizers_length_is_bounded_by_its_text_encoders(changed, tiny, length):
    model = load_model(changed(TOKENIZER, model_max_length=length), CPU)
    assert model.pipeline.tokenizer.model_max_length == 16
    assert torch.equal(model.encode_prompt(["VanGogh"]), tiny.encode_prompt(["VanGogh"]))
    assert model.digest == tiny.digest


@pytest.mark.parametrize("length", [0, 1, -1, "x", 2.5, True, [16]])
def test_a_tokenizers_length_that_holds_no_prompt_is_refused(changed, length):
    refused(changed(TOKENIZER, model_max_length=length), TOKENIZER, "model_max_length")


@pytest.mark.parametrize("field", ["attn_implementation", "_attn_implementation"])
@pytest.mark.parametrize("value", ["kernels-community/flash-attn", "flash_attention_2", "none", 3, {"": "x/y"}])
def test_a_text_encoders_config_fetches_no_code(changed, monkeypatch, field, value):
    def fetch(*_, **__):
        raise AssertionError("code was asked for")

    for name in ("lazy_import_flash_attention", "is_kernel"):
        monkeypatch.setattr(modeling_utils, name, fetch)
    message = refused(changed(TEXT, **{field: value}), TEXT, field)
    assert "asked for" not in message


@pytest.mark.parametrize("field", ["auto_map", "quantization_config", "per_layer_config"])
@pytest.mark.parametrize("name", [TEXT, VAE, TOKENIZER])
def test_configs_that_ask_for_code_or_other_weights_are_refused(changed, name, field):
    refused(changed(name, **{field: {"a": "b"}}), name, field)


def test_an_adapter_beside_a_text_encoder_is_refused(changed):
    folder = changed(INDEX)
    (folder / "text_encoder" / "adapter_config.json").write_text('{"base_model_name_or_path": "a/b"}')
    refused(folder, "adapter_config.json")


def test_of_variants_the_named_one_is_read(changed, tiny):
    folder = changed(INDEX)
    for part, name in WEIGHTS.items():
        path = folder / part / name
        path.rename(path.with_suffix(".fp16.safetensors"))
    refused(folder, "unet", "fp16", "give `variant` fp16")
    assert load_model(folder, CPU, variant="fp16").digest == tiny.digest
    refused(folder, "`variant` bf16", "fp16", variant="bf16")
    refused(folder, "`variant`", variant="../fp16")
    shutil.copy(folder / "vae" / "diffusion_pytorch_model.fp16.safetensors", folder / "vae" / WEIGHTS["vae"])
    (folder / "vae" / "diffusion_pytorch_model.fp16.safetensors").unlink()  # then the plain one is taken
    model = load_model(folder, CPU, variant="fp16")
    reference = StableDiffusionPipeline.from_pretrained(
        folder, dtype=torch.float32, variant="fp16", safety_checker=None
    )
    for name, value in reference.vae.state_dict().items():
        assert torch.equal(model.vae.state_dict()[name], value)
    refused(changed(INDEX), "leave it out", variant="fp16")


def test_pickled_weights_are_named_and_what_to_do(changed):
    folder = changed(INDEX)
    (folder / "unet" / WEIGHTS["unet"]).unlink()
    torch.save({}, folder / "unet" / "diffusion_pytorch_model.bin")
    refused(folder, "diffusion_pytorch_model.bin", "safe_serialization")
    (folder / "unet" / "diffusion_pytorch_model.bin").unlink()
    refused(folder, "no weights")


def shard(folder: Path, part: str) -> Path:
    """Write the weights of a part, times two, as two shards beside the single file."""
    stem = WEIGHTS[part].removesuffix(".safetensors")
    tensors = load_file(folder / part / WEIGHTS[part])
    names = sorted(tensors)
    weight_map = {}
    for number, chosen in enumerate((names[::2], names[1::2])):
        file = f"{stem}-0000{number + 1}-of-00002.safetensors"
        save_file({name: tensors[name] * 2 for name in chosen}, folder / part / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(chosen, file)
    index = folder / part / f"{stem}.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return index


def test_of_shards_and_a_single_file_the_one_is_read_that_the_libraries_read(changed):
    folder = changed(INDEX)
    for part in WEIGHTS:
        shard(folder, part)
    model = load_model(folder, CPU)
    reference = StableDiffusionPipeline.from_pretrained(folder, dtype=torch.float32, safety_checker=None)
    for part in WEIGHTS:
        expected = getattr(reference, part).state_dict()
        for name, value in getattr(model.pipeline, part).state_dict().items():
            assert torch.equal(value, expected[name]), (part, name)


def test_an_index_that_names_missing_or_foreign_shards_is_refused(changed):
    for part in ("unet", "vae", "text_encoder"):
        folder = changed(INDEX)
        index = shard(folder, part)
        (folder / part / WEIGHTS[part]).unlink()
        content = json.loads(index.read_text())
        (index.parent / sorted(set(content["weight_map"].values()))[1]).unlink()
        refused(folder, "00002-of-00002", index.name)
        for names in ({"a": "../../x.safetensors"}, {"a": 3}, {}, []):
            index.write_text(json.dumps({"weight_map": names}))
            refused(folder, index.name, "weight_map")


@pytest.fixture
def checkpoint(tiny, tiny_path, tmp_path):
    """Return tensors in CompVis' layout, and the config that says what they are of."""
    tensors = convert_to_compvis(tiny.denoiser.state_dict(), tiny.vae.state_dict(), tiny.text_encoder.state_dict())
    return {name: value.contiguous() for name, value in tensors.items()}, compvis_config(tiny_path, tmp_path)


@pytest.mark.parametrize("name", ["a.safetensors", "a.ckpt", "a.CKPT", "a.pth", "a.SafeTensors", "a.bin", "a", "a.b"])
@pytest.mark.parametrize("pickled", [True, False])
def test_a_checkpoint_is_told_by_its_content(checkpoint, tiny, tmp_path, name, pickled):
    tensors, config = checkpoint
    path = tmp_path / name
    if pickled:
        torch.save({"state_dict": tensors}, path)
    else:
        save_file(tensors, path)
    assert is_checkpoint(path) and is_safetensors(path) is not pickled
    model = load_model(path, CPU, config)
    assert model.digest == tiny.digest and model.checkpoint == path
    assert model.name == ("a.b" if name == "a.b" else name if name == "a.bin" else "a")


def test_a_folder_called_as_a_checkpoint_is_a_folder(tiny_path, tiny, tmp_path):
    shutil.copytree(tiny_path, tmp_path / "model.ckpt")
    assert load_model(tmp_path / "model.ckpt", CPU).digest == tiny.digest
    assert not is_checkpoint("owner/name") and not is_checkpoint("x" * 300) and is_checkpoint("gone.PTH")
    refused("x" * 300, "`model`")


def test_a_checkpoint_that_is_no_whole_stable_diffusion_v1_says_what_it_holds(checkpoint, tiny, tmp_path):
    tensors, config = checkpoint
    unet, vae, text = "model.diffusion_model.", "first_stage_model.", "cond_stage_model.transformer."
    own = {name: {key: value for key, value in tensors.items() if key.startswith(name)} for name in (unet, vae, text)}

    def renamed(old, new):
        return {key.replace(old, new, 1): value for key, value in tensors.items()}

    first = f"{unet}input_blocks.0.0.weight"
    cases = [
        (own[unet] | own[text], ["no autoencoder (VAE)"]),
        (own[unet] | own[vae], ["no text encoder"]),
        (own[vae] | own[text], ["no U-Net"]),
        (own[unet], ["no autoencoder (VAE) and no text encoder"]),
        (renamed("cond_stage_model.transformer", "conditioner.embedders.0.transformer"), ["Stable Diffusion XL"]),
        (renamed("cond_stage_model.transformer", "cond_stage_model.model"), ["Stable Diffusion 2"]),
        (renamed(unet, "diffusion_model."), ["'diffusion_model.' in place of"]),
        (renamed("", "module."), ["'module.model.diffusion_model.' in place of"]),
        (dict(tiny.denoiser.state_dict()), ["diffusers' layout"]),
        ({f"unet.{key}": value for key, value in tiny.denoiser.state_dict().items()}, ["diffusers' layout"]),
        ({"unet.down_blocks.0.attn2.to_k.lora_A.weight": torch.ones(2, 2)}, ["a LoRA"]),
        ({"lora_unet_down_blocks_0.lora_up.weight": torch.ones(2, 2)}, ["a LoRA"]),
        ({"control_model.a": torch.ones(2)}, ["a ControlNet"]),
        ({"emb_params": torch.ones(2)}, ["a textual inversion"]),
        (tensors | {first: torch.ones(8, 9, 3, 3)}, ["9 input channels", "inpainting"]),
        ({}, ["no U-Net"]),
    ]
    path = tmp_path / "other.safetensors"
    for content, words in cases:
        save_file({key: value.contiguous() for key, value in content.items()}, path)
        refused(path, "other.safetensors", "give", *words, config=config)
    for kind in ("weight shift", "null-space basis"):
        save_tensors(path, {"a": torch.ones(1)}, kind, {})
        refused(path, kind, "`model`", config=config)
    refused(path, "`variant`", variant="fp16")


def test_a_checkpoint_has_the_tensors_that_its_config_describes(checkpoint, tmp_path):
    tensors, config = checkpoint
    path = tmp_path / "a.safetensors"
    for part, extra in (
        ("cond_stage_model", "cond_stage_model.transformer.text_model.encoder.layers.1.layer_norm1.weight"),
        ("first_stage_model", "first_stage_model.decoder.up.0.block.5.norm1.weight"),
        ("model.diffusion_model", "model.diffusion_model.input_blocks.9.0.in_layers.0.weight"),
    ):
        name = next(name for name in tensors if name.startswith(part) and "norm" in name)
        save_file({key: value for key, value in tensors.items() if key != name}, path)
        refused(path, "lacks", name, config=config)
        save_file(tensors | {extra: torch.ones(8)}, path)
        refused(path, extra, "`config_path`", config=config)
    save_file(tensors | {"cond_stage_model.transformer.text_model.embeddings.position_ids": torch.ones(1, 16)}, path)
    load_model(path, CPU, config)


def test_checkpoints_are_made_of_stable_diffusion_v1s_parts(checkpoint, xl_path, changed, tmp_path):
    tensors, config = checkpoint
    path = tmp_path / "a.safetensors"
    save_file(tensors, path)
    OmegaConf.save({"component_configs": str(xl_path)}, config)
    refused(path, "Stable Diffusion v1", config=config)
    OmegaConf.save({"component_configs": str(changed(UNET, time_cond_proj_dim=8))}, config)
    refused(path, "time_cond_proj_dim", config=config)
    OmegaConf.save({"component_configs": "../../.."}, config)
    refused(path, "model_index.json", "missing", config=config)
    config.write_text("component_configs: ${oc.env:HOME}")
    refused(path, "tiny.yaml", "${oc.env:HOME}", "`config_path`", config=config)


def test_compvis_layout_has_one_number_of_layers():
    config = OmegaConf.to_container(TINY.unet) | {"layers_per_block": [1, 2]}
    with pytest.raises(ValueError, match="different numbers of layers"):
        unet_key_map(UNet2DConditionModel(**config).state_dict())
    names = list(UNet2DConditionModel(**OmegaConf.to_container(TINY.unet)).state_dict())
    assert len(set(unet_key_map(names).values())) == len(names)


def test_layers_per_block_as_a_list_is_read_as_diffusers_reads_it(changed):
    config = OmegaConf.to_container(TINY.unet) | {"layers_per_block": [1, 2]}
    unet = UNet2DConditionModel(**config)
    folder = changed(INDEX)
    unet.save_pretrained(folder / "unet", safe_serialization=True)
    model, sample = load_model(folder, CPU), torch.randn(1, 4, 8, 8)
    embeds = model.encode_prompt(["VanGogh"])
    expected = unet(sample, torch.tensor([3]), embeds).sample
    assert torch.allclose(model.denoiser_output(sample, torch.tensor([3]), embeds), expected, atol=1e-5)


def test_nothing_depends_on_what_a_folder_is_called(tiny_path, tiny, tmp_path):
    for name in ("with space", "new\nline", "logos", "a..b", "${x}"):
        shutil.copytree(tiny_path, tmp_path / name)
        model = load_model(tmp_path / name, CPU)
        assert model.digest == tiny.digest and model.config_name == name
    assert resolve_names(tmp_path / "logos" / ".." / "a..b") == ("a..b", "a..b")


def test_an_autoencoder_with_older_names_is_read(changed, tiny):
    folder = changed(INDEX)
    path = folder / "vae" / WEIGHTS["vae"]
    older = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = {}
    for name, value in load_file(path).items():
        for new, old in older.items():
            name = name.replace(f".attentions.0.{new}.", f".attentions.0.{old}.")
        tensors[name] = value
    assert any("proj_attn" in name for name in tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    vae: AutoencoderKL = load_model(folder, CPU).vae
    for name, value in tiny.vae.state_dict().items():
        assert torch.equal(vae.state_dict()[name], value)


@pytest.mark.parametrize("folder", ["configs/stable-diffusion/v1", "models/mini-sd", "models/mini-sd-logos"])
def test_the_configs_that_are_here_are_of_models_that_are_computed(folder):
    check_configs(REPO_ROOT / folder, False)
    path = REPO_ROOT / folder / INDEX
    check_index(path, read_config(path), False)


def test_a_model_with_a_bert_is_loaded_as_diffusers_loads_it_without_a_word(bert_path, capfd):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", DeprecationWarning)  # NumPy's for diffusers, which no user sees
        model = load_model(bert_path, CPU)
    assert capfd.readouterr() == ("", "")
    pipeline = StableDiffusionPipeline.from_pretrained(bert_path)  # without a dtype
    assert isinstance(model.text_encoder, BertModel) and isinstance(pipeline.text_encoder, BertModel)
    for part in ("unet", "vae", "text_encoder"):
        weights = getattr(pipeline, part).state_dict()
        for name, value in getattr(model.pipeline, part).state_dict().items():
            assert value.dtype == weights[name].dtype and torch.equal(value, weights[name]), (part, name)
    assert {weight.dtype for weight in pipeline.unet.parameters()} == {torch.float32}
    stored = load_file(bert_path / "text_encoder" / WEIGHTS["text_encoder"])
    assert {weight.dtype for weight in stored.values()} == {torch.float16}
    embeds = model.encode_prompt(["a painting by Van Gogh", ""])
    assert embeds.shape == (2, 12, 96) and embeds.dtype == torch.float32
    expected, _ = pipeline.encode_prompt("a painting by Van Gogh", CPU, 1, False)
    assert torch.equal(embeds[:1], expected)


def test_a_model_with_a_bert_generates_what_diffusers_pipeline_generates(bert_path):
    model, pipeline = load_model(bert_path, CPU), StableDiffusionPipeline.from_pretrained(bert_path)
    pipeline.set_progress_bar_config(disable=True)
    noise, sampling = initial_noise(model, 3, 1), SamplingConfig(num_inference_steps=3, guidance_scale=4.0)
    theirs = pipeline("a church", num_inference_steps=3, guidance_scale=4.0, latents=noise, output_type="np").images[0]
    ((_, _, ours),) = generate(model, [(PromptCase("a church", 3, 0), 0)], sampling)
    assert theirs.shape == (16, 16, 3) and theirs.std() > 0
    assert abs(theirs * 255 - ours).max() <= 1


def test_a_berts_vocabulary_may_be_a_list_of_words(changed, bert_path):
    folder = changed(INDEX, bert_path)
    vocabulary = json.loads((folder / "tokenizer" / "tokenizer.json").read_text())["model"]["vocab"]
    (folder / "tokenizer" / "tokenizer.json").unlink()
    refused(folder, "vocab.txt", "missing")
    (folder / "tokenizer" / "vocab.txt").write_text("\n".join(sorted(vocabulary, key=vocabulary.get)) + "\n")
    assert load_model(folder, CPU).digest == load_model(bert_path, CPU).digest


def test_the_words_of_a_berts_vocabulary_are_its_whole_words(bert_path):
    tokenizer = load_model(bert_path, CPU).pipeline.tokenizer
    assert tokenizer.tokenize("VanGogh, Zoe") == ["van", "##gogh", "[UNK]", "z", "##o", "##e"]
    assert vocabulary_words(tokenizer) == ["artist", "church", "gogh", "painting", "photo", "picasso", "van"]


@pytest.mark.parametrize("field", ["is_decoder", "add_cross_attention"])
def test_a_bert_that_decodes_is_refused(changed, bert_path, field):
    refused(changed(TEXT, bert_path, **{field: True}), TEXT, field, "no decoder")
    load_model(changed(TEXT, bert_path, **{field: False}), CPU)


def test_a_tokenizer_and_a_text_encoder_are_of_one_family(changed, bert_path, xl_path):
    refused(changed(INDEX, bert_path, tokenizer=["transformers", "CLIPTokenizer"]), INDEX, "CLIPTokenizer", "BertModel")
    refused(changed(INDEX, tokenizer=["transformers", "BertTokenizer"]), INDEX, "BertTokenizer", "CLIPTextModel")
    refused(changed(INDEX, text_encoder=["transformers", "BertModel"]), INDEX, "CLIPTokenizer", "BertModel")
    refused(changed(INDEX, xl_path, tokenizer_2=["transformers", "BertTokenizer"]), INDEX, "tokenizer_2")
    load_model(changed(INDEX, bert_path, tokenizer=["transformers", "BertTokenizerFast"]), CPU)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_hidden_layers": 3},
        {"num_attention_heads": 5},
        {"hidden_size": 64},
        {"vocab_size": 10},
        {"hidden_act": "none"},
        {"auto_map": {"AutoModel": "harm.Harm"}},
        {"_attn_implementation": "flash_attention_2"},
    ],
)
def test_a_berts_config_that_does_not_fit_or_asks_for_code_is_refused(changed, bert_path, changes):
    refused(changed(TEXT, bert_path, **changes))


@pytest.mark.parametrize("length", [24, 512, 10**30, None])
def test_a_prompt_is_no_longer_than_a_berts_positions(changed, bert_path, length):
    model = load_model(changed(TOKENIZER, bert_path, model_max_length=length), CPU)
    assert model.encode_prompt(["a church"]).shape == (1, min(length or 512, 32), 96)


@pytest.fixture
def bert_shift(bert_path, tmp_path) -> WeightShift:
    """Return SRS-ME's shift of VanGogh from the model with a BERT, in closed form."""
    config = SRSMEConfig(mode="closed_form", init="closed_form", max_directions=None)
    artifacts = ArtifactPaths(tmp_path / "artifacts", "SRS-ME", "bert", "style", 1, 0)
    protection = Protection(styles(0, 1, 2), NullSpaceConfig())
    (summary,) = erase(load_model(bert_path, CPU), artifacts, [get_concept("style", 1)], config, protection, tmp_path)
    assert summary.max_leakage_protected < 1e-5 < 0.05 < summary.target_change
    return WeightShift.load(artifacts.shift(1))


def test_srs_me_erases_from_a_model_with_a_bert(bert_path, bert_shift):
    model, timestep = load_model(bert_path, CPU), torch.tensor([500])
    latents = torch.randn(1, *model.latent_shape)
    embeds = {prompt: model.encode_prompt([prompt]) for prompt in ("VanGogh", "Picasso", "")}
    before = {prompt: model.predict_noise(latents, timestep, rows) for prompt, rows in embeds.items()}
    with applied(model.denoiser, [bert_shift]):
        after = {prompt: model.predict_noise(latents, timestep, rows) for prompt, rows in embeds.items()}
    change = {prompt: float((after[prompt] - output).norm()) for prompt, output in before.items()}
    assert change["Picasso"] < 1e-3 * change["VanGogh"] and change[""] < 1e-3 * change["VanGogh"]
    assert set(merge(model.denoiser, [bert_shift])) == {f"{name}.weight" for name in model.text_layers}


def test_a_model_with_a_bert_is_exported_in_every_format_but_compvis(bert_path, bert_shift, tmp_path):
    shifts, target = {"1": bert_shift}, tmp_path / "out" / "merged"
    with pytest.raises(ValueError, match=r"^bert is no Stable Diffusion v1, .*choose `format` [^\n]*$"):
        export(load_model(bert_path, CPU), shifts, target, ExportConfig(("compvis",)), ["", "VanGogh"])
    assert not any(tmp_path.glob("out/*"))
    formats = ExportConfig(("diffusers", "unet", "lora", "kohya"))
    exported = export(load_model(bert_path, CPU), shifts, target, formats, ["", "VanGogh"])
    assert sorted(path.name for path in exported.targets) == ["merged", "merged-kohya", "merged-lora", "merged-unet"]
    merged = load_model(target, CPU)
    expected = merge(load_model(bert_path, CPU).denoiser, [bert_shift])
    unets = (merged.denoiser, UNet2DConditionModel.from_pretrained(tmp_path / "out" / "merged-unet"))
    for unet in unets:
        assert all(torch.equal(unet.get_parameter(name), weight) for name, weight in expected.items())
    assert isinstance(StableDiffusionPipeline.from_pretrained(target).text_encoder, BertModel)
    for name in ("lora", "kohya"):
        pipeline = StableDiffusionPipeline.from_pretrained(bert_path)
        folder = tmp_path / "out" / f"merged-{name}"
        pipeline.load_lora_weights(folder, weight_name="1-VanGogh.safetensors", adapter_name="VanGogh")
        assert pipeline.get_list_adapters() == {"unet": ["VanGogh"]}


@pytest.mark.slow
def test_the_memory_of_an_erasure_is_estimated_for_the_tokens_of_a_bert(changed, bert_path):
    table = estimate_memory(bert_path, CPU, 8, 40)
    weights = sum(weight.numel() for weight in load_model(bert_path, CPU).text_encoder.parameters())
    longer = estimate_memory(changed(TOKENIZER, bert_path, model_max_length=32), CPU, 8, 40)
    assert len(table) == 5 and table["weights"][0] * 2**30 > 4 * weights
    assert longer["beside them"][0] > table["beside them"][0] and longer["weights"][0] == table["weights"][0]


def test_a_checkpoint_of_a_model_with_a_bert_is_refused_by_its_config(checkpoint, bert_path, tmp_path):
    tensors, config = checkpoint
    save_file(tensors, tmp_path / "a.safetensors")
    OmegaConf.save({"component_configs": str(bert_path)}, config)
    refused(tmp_path / "a.safetensors", str(bert_path), "`ckpt_path`", config=config)


@pytest.mark.parametrize(
    "source", ["./nope", "models/nope", "/x/y", "nope", "a/b/c", "~/nope", "no pe", "models/nope/"]
)
def test_a_path_where_no_model_is_is_told_as_one(source, monkeypatch, tmp_path):
    (tmp_path / "models").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        ValueError, match=f"^there is no model at {source}: give `model` the path of a diffusers folder"
    ):
        load_model(source)


def test_a_path_that_is_misspelt_names_the_folder_beside_it(tiny_path):
    with pytest.raises(ValueError, match=r"there is no model at .*, did you mean tiny\?$"):
        load_model(tiny_path.with_name("tinny"))


def test_a_hub_id_without_a_network_is_told_as_one():
    words = "^'CompVis/stable-diffusion-v1-4' is neither a folder here nor a model of the hub.*HF_HUB_OFFLINE is set$"
    with pytest.raises(ValueError, match=words):
        load_model("CompVis/stable-diffusion-v1-4")


@pytest.mark.parametrize("name", ["./nope", "CompVis/stable-diffusion-v1-4"])
def test_a_script_tells_the_same_in_one_line(script, name):
    words = {"./nope": "there is no model at ./nope: give --model"}.get(name, "is neither a folder here nor a model")
    is_error(script("train-scripts/SRS_ME.py", "--model", name, "--estimate_memory"), words)
    is_error(script("train-scripts/Merge_model.py", "--model", name, "--shifts", "1"), words)


def generate_plainly(folder: Path) -> None:
    """Load a folder by diffusers without any argument, and generate: all parts have one dtype."""
    pipeline = DiffusionPipeline.from_pretrained(folder)
    parts = [part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)]
    assert len(parts) >= 3 and {weight.dtype for part in parts for weight in part.parameters()} == {torch.float32}
    image = pipeline("a photo of a church", num_inference_steps=2, output_type="np").images[0]
    assert image.shape[2] == 3 and image.std() > 0.01


@pytest.mark.parametrize("name", ["mini-sd", "mini-sd-logos", "mini-sd-minilm"])
def test_a_bundled_model_generates_by_diffusers_alone(name):
    generate_plainly(REPO_ROOT / "models" / name)


def test_what_is_saved_in_half_precision_generates_by_diffusers_alone(tiny, tiny_path, xl_path, tmp_path):
    generate_plainly(tiny_path)  # which the training of the bundled models saves so
    for model, folder in ((tiny, tmp_path / "tiny"), (load_model(xl_path, CPU), tmp_path / "xl")):
        shift = SeparableShift.zeros(text_layers(model.denoiser), torch.eye(96)[:3], 1.0)
        export(model, {"1": shift}, folder, ExportConfig(("diffusers",), "float16"), [""])
        assert load_file(folder / "unet" / WEIGHTS["unet"])["conv_in.weight"].dtype == torch.float16
        generate_plainly(folder)
