"""What exported files say to the programs that load them, and checkpoints as CompVis' own code takes them."""

import hashlib
import json
from copy import copy

import pytest
import torch
from conftest import CPU, TINY, compvis_config, make_xl
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from families import make_family
from omegaconf import OmegaConf
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_export import compvis_tensors, ema_key, make_shift

from ldm.config.methods import LINEAR_FORMATS, ExportConfig
from ldm.diffusion.compvis import UNET_PREFIX, convert_to_compvis, unet_key_map
from ldm.diffusion.family import ModelSpec
from ldm.diffusion.load import load_model
from ldm.diffusion.text_layers import text_layers
from ldm.erasure.export import export, save_compvis
from ldm.erasure.export_lora import save_kohya, save_lora
from ldm.erasure.export_metadata import lora_metadata, save_with_metadata
from ldm.erasure.shift import DenseShift, SeparableShift, WeightShift
from ldm.io.tensors import METADATA_KEY

ALL_BUT_COMPVIS = "choose `format` diffusers, unet or shift"


@pytest.fixture(scope="module")
def xl_path(tmp_path_factory):
    return make_xl(tmp_path_factory.mktemp("models") / "tiny-xl")


@pytest.fixture
def shifts(tiny, tmp_path):
    """Return a shift as a file has it, with the digest of its contents."""
    shift = make_shift(tiny, "VanGogh", 1)
    shift.save(tmp_path / "shift.safetensors", shift.metadata | {"method": "SRS-ME"})
    return {"1": WeightShift.load(tmp_path / "shift.safetensors")}


def metadata_of(path) -> dict[str, str]:
    with safe_open(path, framework="pt") as opened:
        return opened.metadata()


def part(model, name: str) -> dict[str, torch.Tensor]:
    return dict((model.denoiser if name == "unet" else getattr(model, name)).state_dict())


def converted(model, **parts) -> dict[str, torch.Tensor]:
    """Return the model in CompVis' layout, with other `parts`."""
    own = {name: part(model, name) for name in ("unet", "vae", "text_encoder")}
    return convert_to_compvis(**own | parts)


def spec_of(model) -> ModelSpec:
    return model.adapter.model_spec(model.pipeline)


def test_a_model_is_known_by_structure(tiny, xl_path):
    known = {"network": "networks.lora", "prediction_type": "epsilon"}
    assert spec_of(tiny) == ModelSpec("stable-diffusion-v1", "sd_v1", **known)
    tiny.text_encoder.config.hidden_act = "gelu"
    assert spec_of(tiny) == ModelSpec("stable-diffusion-v2-512", "sd_v2", **known, is_v2=True)
    tiny.scheduler.register_to_config(prediction_type="v_prediction")
    assert spec_of(tiny) == ModelSpec(
        "stable-diffusion-v2-768-v", "sd_v2_v", "networks.lora", prediction_type="v", is_v2=True
    )
    implementation = "https://github.com/Stability-AI/generative-models"
    expected = ModelSpec("stable-diffusion-xl-v1-base", "sdxl_base_v1-0", implementation=implementation, **known)
    assert spec_of(load_model(xl_path, CPU)) == expected


def test_other_families_are_called_what_sd_scripts_calls_them_or_nothing(tmp_path):
    """ModelSpec asks for an architecture, so that a model without a name there has none of its keys."""
    specs = {}
    for name in ("flux", "sd3", "lumina2", "sana", "flux2-klein"):
        model = load_model(make_family(name, tmp_path / name), CPU)
        tensors = {"a.lora_A.weight": torch.ones(2, 3), "b.lora_A.weight": torch.ones(1, 3)}
        shift = DenseShift({"a.weight": torch.ones(2, 2)}, {"concept": "VanGogh"})
        specs[name] = lora_metadata(model, "1", shift, tensors, is_kohya=True)
        if name == "sd3":
            for qk_norm, layers, version in (("rms_norm", (), "large"), ("rms_norm", (0,), "medium")):
                model.denoiser.register_to_config(qk_norm=qk_norm, dual_attention_layers=layers)
                assert spec_of(model).version == f"3-5-{version}"
                assert spec_of(model).architecture == f"stable-diffusion-3-3-5-{version}"
        if name == "flux":
            model.denoiser.register_to_config(guidance_embeds=False)
            assert spec_of(model).architecture == "flux-1-schnell"
    keys = ("modelspec.architecture", "modelspec.implementation", "ss_base_model_version", "ss_network_module")
    assert {name: tuple(spec.get(key) for key in keys) for name, spec in specs.items()} == {
        "flux": ("flux-1-dev/lora", "https://github.com/black-forest-labs/flux", "flux1", "networks.lora_flux"),
        "sd3": ("stable-diffusion-3-3-medium/lora", "diffusers", "3-medium", "networks.lora_sd3"),
        "lumina2": (
            "lumina-2/lora",
            "https://github.com/Alpha-VLLM/Lumina-Image-2.0",
            "lumina2",
            "networks.lora_lumina",
        ),
        "sana": (None,) * 4,
        "flux2-klein": (None,) * 4,
    }
    for name, spec in specs.items():
        assert "modelspec.prediction_type" not in spec and spec["ss_network_dim"] == "Dynamic"
        assert any(key.startswith("modelspec.") for key in spec) == (name in ("flux", "sd3", "lumina2"))


def test_a_kohya_file_says_what_sd_scripts_would(tiny, shifts, tmp_path):
    save_kohya(tiny, shifts, tmp_path, torch.float32)
    written = metadata_of(tmp_path / "1-VanGogh.safetensors")
    own = json.loads(written.pop(METADATA_KEY))
    content = (tmp_path / "1-VanGogh.safetensors").read_bytes()
    digest = hashlib.sha256(content[8 + int.from_bytes(content[:8], "little") :]).hexdigest()  # without the header
    assert written == {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": "stable-diffusion-v1/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.title": "VanGogh erased from tiny",
        "modelspec.description": "A LoRA of rank 12 that erases VanGogh from tiny, made by srs-me.",
        "modelspec.category": "Concept erasure",
        "modelspec.tags": "VanGogh",
        "modelspec.usage_hint": "Strength 1 erases the concept, strength 0 restores it.",
        "modelspec.hash_sha256": f"0x{digest}",
        "sshs_model_hash": digest,
        "modelspec.resolution": "16x16",
        "modelspec.prediction_type": "epsilon",
        "ss_base_model_version": "sd_v1",
        "ss_network_module": "networks.lora",
        "ss_network_dim": "12",
        "ss_network_alpha": "12",
        "ss_output_name": "1-VanGogh",
        "ss_sd_model_name": "tiny",
        "ss_training_comment": "erases VanGogh. Strength 1 erases the concept, strength 0 restores it.",
        "ss_v2": "False",
    }
    assert own == {
        "file_type": "LoRA",
        "created_by": "srs-me",
        "metadata": {
            "base_model": "tiny",
            "base_digest": tiny.digest,
            "shifts": {
                "1": {
                    "concept": "VanGogh",
                    "prompt": "VanGogh",
                    "method": "SRS-ME",
                    "rank": 12,
                    "scale": 1.0,
                    "content_digest": shifts["1"].content_digest,
                }
            },
        },
    }
    with pytest.raises(ValueError, match="is not a weight shift but a LoRA"):
        WeightShift.load(tmp_path / "1-VanGogh.safetensors")


def test_an_xl_lora_is_known_as_one_and_loads(xl_path, tmp_path):
    model = load_model(xl_path, CPU)
    layers = text_layers(model.denoiser)
    shift = SeparableShift.zeros(layers, torch.eye(layers.width)[[0, 1, 2, -2, -1]], 1.0).on(layers)
    shift.metadata = {"concept": "VanGogh"}
    for weight in shift.coefficients.values():
        weight.data += 0.5
    pipeline = StableDiffusionXLPipeline.from_pretrained(xl_path)
    for save, implementation in (
        (save_lora, "diffusers"),
        (save_kohya, "https://github.com/Stability-AI/generative-models"),
    ):
        folder = tmp_path / save.__name__
        folder.mkdir()
        save(model, {"1": shift}, folder, torch.float32)
        written = metadata_of(folder / "1-VanGogh.safetensors")
        assert written["ss_base_model_version"] == "sdxl_base_v1-0" and written["ss_v2"] == "False"
        assert written["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"
        assert written["modelspec.implementation"] == implementation
        assert ("ss_network_module" in written) == (save is save_kohya)
        pipeline.load_lora_weights(folder, weight_name="1-VanGogh.safetensors", adapter_name=save.__name__)
        for name in layers:
            delta = pipeline.unet.get_submodule(name).get_delta_weight(save.__name__)
            assert torch.allclose(delta.double(), shift.delta_weight(f"{name}.weight"), atol=1e-6)


def test_every_single_file_says_what_was_merged_and_repeats_its_bytes(tiny, tiny_path, shifts, tmp_path):
    files = {
        "compvis/model.safetensors": (METADATA_KEY, "merged checkpoint", 12),
        "kohya/1-VanGogh.safetensors": (METADATA_KEY, "LoRA", 0),  # the rank that it was cut to
        "lora/1-VanGogh.safetensors": (METADATA_KEY, "LoRA", 0),
        "unet/diffusion_pytorch_model.safetensors": (METADATA_KEY, "merged denoiser", 12),
    }
    digests = []
    for name in ("first", "again"):
        model = load_model(tiny_path, CPU)
        config = ExportConfig(LINEAR_FORMATS, effect_fraction=0.1)
        result = export(model, shifts, tmp_path / name / "out", config, [""])
        digests.append({})
        for path in sorted((tmp_path / name).rglob("*")):
            if path.is_file() and not path.is_symlink():
                relative = path.relative_to(tmp_path / name).as_posix()
                digests[-1][relative] = hashlib.sha256(path.read_bytes()).hexdigest()
        assert result.truncated[0]["formats"] == "lora, kohya" and result.truncated[0]["rank"] < shifts["1"].rank
    assert digests[0] == digests[1] and "out-compvis/model.ckpt" in digests[0]
    for file, (key, file_type, rank) in files.items():
        own = json.loads(metadata_of(tmp_path / "first" / f"out-{file}")[key])
        (said,) = own["metadata"]["shifts"].values()
        assert own["file_type"] == file_type and said["rank"] == (rank or result.truncated[0]["rank"]), file
        assert own["metadata"]["base_digest"] == tiny.digest
        assert said["content_digest"] == shifts["1"].content_digest and said["concept"] == "VanGogh"
    spec = metadata_of(tmp_path / "first" / "out-compvis/model.safetensors")
    assert spec["modelspec.architecture"] == "stable-diffusion-v1" and "VanGogh" in spec["modelspec.description"]
    denoiser = metadata_of(tmp_path / "first" / "out-unet/diffusion_pytorch_model.safetensors")
    assert denoiser["modelspec.architecture"] == "stable-diffusion-v1"
    assert denoiser["modelspec.implementation"] == "diffusers" != spec["modelspec.implementation"]
    assert spec["modelspec.merged_from"] == "tiny" and len(spec["modelspec.hash_sha256"]) == 2 + 64


def test_no_program_would_write_an_erased_concept_into_a_prompt(tiny, shifts):
    for is_kohya in (True, False):
        keys = set(lora_metadata(tiny, "1", shifts["1"], {}, is_kohya))
        assert not keys & {"modelspec.trigger_phrase", "ss_tag_frequency"}


def test_metadata_is_in_one_order_whatever_it_says(tmp_path):
    tensors = {"b": torch.arange(3.0), "a": torch.ones(2, 2, dtype=torch.float16).T}
    metadata = {f"key {n}": 'é "quoted" \\ / \n\t\b\f\x01\x7f\u2028\U0001f58c' * n for n in range(9)}
    written = set()
    for _ in range(4):
        save_with_metadata(tmp_path / "a.safetensors", tensors, metadata)
        written.add((tmp_path / "a.safetensors").read_bytes())
    assert len(written) == 1 and metadata_of(tmp_path / "a.safetensors") == metadata | {"format": "pt"}
    read = load_file(tmp_path / "a.safetensors")
    assert all(torch.equal(read[name], tensors[name]) for name in tensors)


def test_two_concepts_are_never_one_file(tiny, shifts, tmp_path):
    both = {"a b": shifts["1"], "A-B": shifts["1"]}
    with pytest.raises(ValueError, match="is there twice, as a b and as A-B"):
        export(tiny, both, tmp_path / "out", ExportConfig(("compvis", "lora")), [""])
    both["A-B"] = copy(shifts["1"])
    both["A-B"].content_digest = "another"
    with pytest.raises(ValueError, match="would both be a-b-vangogh"):
        export(tiny, both, tmp_path / "out", ExportConfig(("compvis", "lora")), [""])
    assert not list(tmp_path.glob("out*"))


def test_a_folder_becomes_a_checkpoint_that_compvis_own_code_reads(tiny, tiny_path, shifts, tmp_path):
    save_compvis(tiny, shifts, tmp_path, torch.float32)
    content = torch.load(tmp_path / "model.ckpt", weights_only=True)  # as its txt2img does, and the next line
    tensors, same = content["state_dict"], load_file(tmp_path / "model.safetensors")
    assert tensors.keys() == same.keys() and all(torch.equal(tensors[name], same[name]) for name in same)
    assert all(value.is_contiguous() for value in tensors.values())
    back = [
        load_model(tmp_path / f"model.{end}", CPU, compvis_config(tiny_path, tmp_path))
        for end in ("ckpt", "safetensors")
    ]
    assert back[0].digest == back[1].digest == tiny.digest  # of which nothing was merged but by `export`


@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
def test_only_weights_are_rounded(suffix, tiny, tiny_path, shifts, tmp_path):
    tensors = compvis_tensors(tiny)
    ema = ema_key(f"{UNET_PREFIX}out.2.weight")
    kept = {
        "betas": torch.linspace(1e-4, 0.02, 7, dtype=torch.float64),
        "alphas_cumprod": torch.tensor([0.9991, 0.9999]),
        "model_ema.decay": torch.tensor(0.9999),
        "model_ema.num_updates": torch.tensor(7),
        "cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(16)[None],
    }
    path = tmp_path / f"base{suffix}"
    everything = tensors | kept | {ema: torch.full((4, 8, 3, 3), 0.1)}
    torch.save({"state_dict": everything}, path) if suffix == ".ckpt" else save_file(everything, path)
    model = load_model(path, CPU, compvis_config(tiny_path, tmp_path))
    save_compvis(model, shifts, tmp_path, torch.float16)
    written = tmp_path / f"model{suffix}"
    read = torch.load(written, weights_only=True)["state_dict"] if suffix == ".ckpt" else load_file(written)
    assert read.keys() == everything.keys()
    for name, value in kept.items():
        assert read[name].dtype == value.dtype and torch.equal(read[name], value), name
    assert {read[name].dtype for name in read.keys() - kept.keys()} == {torch.float16}
    assert torch.equal(read[ema], everything[ema].half())


def test_no_checkpoint_is_written_of_xl_or_version_2(tiny, xl_path, tmp_path):
    xl = load_model(xl_path, CPU)
    tiny.text_encoder.config.hidden_act = "gelu"
    for model in (xl, tiny):
        name, weight = next(iter(model.denoiser.named_parameters()))
        shift = DenseShift({name: torch.ones_like(weight)}, {"concept": "VanGogh", "prompt": "VanGogh"})
        with pytest.raises(ValueError, match=ALL_BUT_COMPVIS):
            export(model, {"1": shift}, tmp_path / "out", ExportConfig(("diffusers", "compvis")), [""])
        assert not list(tmp_path.iterdir())


def test_a_unet_of_blocks_of_different_lengths_is_refused(tiny, shifts, tmp_path):
    config = OmegaConf.merge(TINY.unet, {"layers_per_block": [1, 2]})
    tiny.denoiser = UNet2DConditionModel.from_config(OmegaConf.to_container(config))
    with pytest.raises(ValueError, match=r"tiny is not written as compvis: .*different numbers of layers"):
        save_compvis(tiny, shifts, tmp_path, torch.float32)
    assert not list(tmp_path.glob("model*"))


def test_parts_of_another_model_are_refused(tiny):
    assert len(converted(tiny)) == sum(len(part(tiny, name)) for name in ("unet", "vae", "text_encoder"))
    text, unet = part(tiny, "text_encoder"), part(tiny, "unet")
    embedding = next(name for name in text if name.endswith("token_embedding.weight"))
    projection = next(name for name in unet if name.endswith("proj_in.weight"))
    open_clip = {f"transformer.resblocks.0.{name}": value for name, value in text.items()}
    twice = {f"text_model.{name.removeprefix('text_model.')}": value for name, value in text.items()}
    twice |= {name.removeprefix("text_model."): value for name, value in text.items()}
    extra = torch.ones(2, 2)
    cases = [
        ("text encoder", {"text_encoder": text | {"text_projection.weight": extra}}),
        ("text encoder", {"text_encoder": open_clip}),
        ("text encoder", {"text_encoder": text | {embedding: torch.ones(9, 64)}}),
        ("text encoder", {"text_encoder": {"position_ids": torch.arange(3)}}),
        ("both", {"text_encoder": twice}),
        ("linear", {"unet": unet | {projection: unet[projection][:, :, 0, 0]}}),
        ("U-Net", {"unet": unet | {"add_embedding.linear_1.weight": extra}}),
        ("U-Net", {"unet": unet | {"mid_block.resnets.0.conv3.weight": extra}}),
        ("autoencoder", {"vae": {"encoder.layers.0.weight": extra}}),  # as of TAESD
        ("autoencoder", {"vae": part(tiny, "vae") | {"encoder.down_blocks.0.attentions.0.to_q.weight": extra}}),
    ]
    for words, parts in cases:
        with pytest.raises(ValueError, match=f"{words}.*choose another `format`"):
            converted(tiny, **parts)


def test_stable_diffusion_2_has_linear_projections_which_version_1_has_not():
    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=1024, attention_head_dim=64, use_linear_projection=True)
        text = {"embeddings.token_embedding.weight": torch.empty(49408, 1024)}
    assert len(unet_key_map(unet.state_dict())) == 686
    with pytest.raises(ValueError, match="is linear"):
        convert_to_compvis(unet.state_dict(), {}, text)
