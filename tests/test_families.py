"""Every family of models: what of a denoiser sees the prompt alone, and concepts erased and restored in each."""

import inspect
import json
import shutil
from types import SimpleNamespace
from typing import Any

import diffusers
import diffusers.loaders.single_file_utils as original
import pytest
import torch
from conftest import CPU, make_xl
from diffusers import DiffusionPipeline
from families import MAKERS, make_family
from safetensors.torch import load_file

from ldm.config.concepts import Concept, get_concept, watermark_prompts
from ldm.config.methods import ExportConfig, GateConfig, SamplingConfig, SRSMEConfig
from ldm.config.models import FAMILIES as SETTINGS
from ldm.config.models import load_model_config
from ldm.diffusion.edits import edit_embeddings
from ldm.diffusion.families import FAMILIES
from ldm.diffusion.family_masked import AuraFlow
from ldm.diffusion.load import load_model
from ldm.diffusion.load_family import FAMILY_PARTS
from ldm.diffusion.sampling import generate
from ldm.diffusion.text_layers import text_layers
from ldm.erasure.erase import erase
from ldm.erasure.export import export
from ldm.erasure.gate_fitters import make_gate_fitter
from ldm.erasure.gated_edit import GatedPrompts
from ldm.erasure.leakage import each_stream, leakage
from ldm.erasure.memory import estimate_memory
from ldm.erasure.merge import applied
from ldm.erasure.protection import Protection
from ldm.erasure.shift import EmbeddingShift, SeparableShift, WeightShift
from ldm.io.images import image_to_tensor
from ldm.io.paths import REPO_ROOT, ArtifactPaths
from ldm.io.prompts import PromptCase

TINY = SRSMEConfig(
    mode="closed_form",
    init="closed_form",
    ridge_weight=1e-6,
    vocab_preserve_scale=0,
    anchor="neutral",
    target_templates=1,
    max_directions=None,
)
# By the name of a model: the layers that see the prompt first, and how wide what they see is.
LAYERS = {
    "flux": {"time_text_embed.text_embedder.linear_1": 32, "context_embedder": 160},
    "sd3": {"time_text_embed.text_embedder.linear_1": 64, "context_embedder": 200},
    "sd3-without-t5": {"time_text_embed.text_embedder.linear_1": 64, "context_embedder": 200},
    "pixart-alpha": {"caption_projection.linear_1": 160},
    "pixart-sigma": {"caption_projection.linear_1": 160},
    "sana": {"caption_projection.linear_1": 160},
    "auraflow": {"context_embedder": 160},
    "flux2": {"context_embedder": 240},
    "flux2-klein": {"context_embedder": 240},
    "lumina2": {"time_caption_embed.caption_embedder.1": 160},
}


# Those whose layers have names in kohya's LoRAs: diffusers' own conversion of the original checkpoint knows them.
ORIGINAL = {
    "flux": original.convert_flux_transformer_checkpoint_to_diffusers,
    "sd3": original.convert_sd3_transformer_checkpoint_to_diffusers,
    "sd3-without-t5": original.convert_sd3_transformer_checkpoint_to_diffusers,
    "flux2": original.convert_flux2_transformer_checkpoint_to_diffusers,
    "flux2-klein": original.convert_flux2_transformer_checkpoint_to_diffusers,
    "lumina2": original.convert_lumina2_to_diffusers,
}


@pytest.fixture(scope="module", params=list(MAKERS))
def folder(request, tmp_path_factory):
    return make_family(request.param, tmp_path_factory.mktemp("families") / request.param)


def output(model, prompt: str) -> torch.Tensor:
    latents = torch.randn(1, *model.latent_shape, generator=torch.Generator().manual_seed(1))
    return model.denoiser_output(latents, torch.tensor(500.0), model.encode_prompt([prompt]))


def relative(one: torch.Tensor, other: torch.Tensor) -> float:
    return ((one - other).norm() / other.norm()).item()


def test_every_family_is_known_everywhere():
    assert set(FAMILIES) == set(SETTINGS) == {*FAMILY_PARTS, "StableDiffusionPipeline", "StableDiffusionXLPipeline"}
    for name in FAMILIES:
        assert "prompt" in inspect.signature(getattr(diffusers, name).__call__).parameters
    assert set(LAYERS) == set(MAKERS)


def test_the_document_shows_the_smallest_adapter():
    source = inspect.getsource(AuraFlow)
    assert source in (REPO_ROOT / "ldm" / "README.md").read_text() and len(source.splitlines()) <= 60


def test_text_layers_are_found_by_trying(folder):
    layers = load_model(folder, CPU).text_layers
    seen = {name: layers.widths[layers.found[name].stream] for name in layers}
    assert seen == LAYERS[folder.name]
    norms = {layer.norm for layer in layers.found.values()}
    assert norms == ({"time_caption_embed.caption_embedder.0"} if folder.name == "lumina2" else {""})


def call_options(model, folder) -> dict:
    """Return the options by which a pipeline's own call reads and draws as this package does."""
    tokens = {"sd3": 24, "sd3-without-t5": 256}.get(folder.name, model.adapter.num_tokens(model.pipeline))
    side = {"height": model.image_size, "width": model.image_size}
    return {**side, **model.adapter.call_options, "max_sequence_length": tokens, "num_inference_steps": 2}


def test_the_denoiser_is_called_as_the_pipeline_calls_it(folder):
    """Whatever a pipeline's own call gives its denoiser, this package's prediction for the same inputs is its own."""
    model, calls = load_model(folder, CPU), []
    hook = model.denoiser.register_forward_hook(
        lambda _, args, kwargs, result: calls.append((args, kwargs, result)), with_kwargs=True
    )
    pipe = model.pipeline
    pipe.set_progress_bar_config(disable=True)
    options = {"generator": torch.Generator().manual_seed(0), "output_type": "latent"}
    options["guidance_scale"] = 4.0 if folder.name == "flux2" else 3.5  # which its denoiser is told by default
    pipe(prompt="VanGogh", **call_options(model, folder), **options)
    hook.remove()
    args, kwargs, result = calls[-2 if folder.name in ("flux2-klein", "lumina2") else -1]  # the negative prompt is last
    latents = (args[0] if args else kwargs["hidden_states"])[-1:]
    expected = (result.sample if hasattr(result, "sample") else result[0])[-1:]
    if folder.name == "lumina2":
        expected = -expected
    elif latents.dim() == 4:
        expected = expected[:, : model.latent_shape[0]]  # and not PixArt's variance
    found = model.denoiser_output(latents, pipe.scheduler.timesteps[-1], model.encode_prompt(["VanGogh"]))
    assert torch.allclose(found, expected, atol=1e-5)


def test_two_of_three_are_erased_and_one_restored(folder, tmp_path):
    model = load_model(folder, CPU)
    artifacts = ArtifactPaths(tmp_path, "SRS-ME", model.name, "style", scene=1, time=0)
    erased = [get_concept("style", index) for index in (1, 3)]
    null_space = load_model_config(model).null_space.with_changes(protected_templates=0)
    erase(model, artifacts, erased, TINY, Protection([get_concept("style", 0)], null_space), tmp_path)
    shifts = {concept.prompt: WeightShift.load(artifacts.shift(concept.label)) for concept in erased}
    protected = ["", "Cezanne", *watermark_prompts()]
    before = {prompt: output(model, prompt) for prompt in [*protected, *shifts]}
    with applied(model.denoiser, list(shifts.values())):
        after = {prompt: output(model, prompt) for prompt in before}
    for prompt in protected:
        assert relative(after[prompt], before[prompt]) < 1e-5
    for prompt in shifts:
        assert relative(after[prompt], before[prompt]) > 100 * max(relative(after[p], before[p]) for p in protected)
    with applied(model.denoiser, [shifts["VanGogh"]]):
        assert not torch.equal(output(model, "VanGogh"), before["VanGogh"])
    assert all(torch.equal(output(model, prompt), before[prompt]) for prompt in before)


def test_a_gate_leaves_other_prompts_and_no_masked_row_becomes_one(tmp_path):
    for name in ("flux", "pixart-alpha"):
        model = load_model(make_family(name, tmp_path / name), CPU)
        config = GateConfig(retain_captions=40, retain_words=20)
        concept = get_concept("style", 1)
        edit = make_gate_fitter(model, [get_concept("style", 0), concept], ["a photo"], config).fit(concept)
        edit.check(model.text_encoders, model.places, "x")
        prompts = ["VanGogh", "a photo", ""]
        plain = model.encode_prompt(prompts)
        with edit_embeddings(model, GatedPrompts({"1": edit}, model.places)):
            found = model.encode_prompt(prompts)
        assert not torch.equal(found[0], plain[0]) and torch.equal(found[1:], plain[1:])
        assert torch.equal(found.any(-1), plain.any(-1))
        assert set(edit.maps) == set(model.widths)


def erased(model, folder) -> dict[str, WeightShift]:
    """Return a shift that erases VanGogh from a model, by its label."""
    artifacts = ArtifactPaths(folder, "SRS-ME", model.name, "style", scene=1, time=0)
    concept = get_concept("style", 1)
    null_space = load_model_config(model).null_space.with_changes(protected_templates=0)
    erase(model, artifacts, [concept], TINY, Protection([get_concept("style", 0)], null_space), folder)
    return {concept.label: WeightShift.load(artifacts.shift(concept.label))}


def stock_pipeline(path, folder) -> Any:
    """Return the pipeline of diffusers that a path has, of the family of a folder."""
    lacking = {"text_encoder_3": None, "tokenizer_3": None} if folder.name == "sd3-without-t5" else {}
    pipe = DiffusionPipeline.from_pretrained(path, **lacking)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_what_is_exported_gives_a_stock_pipeline_the_same_image(folder, tmp_path):
    """Merged weights, whole or the denoiser's alone, and LoRAs, in kohya's layout where diffusers converts it."""
    model = load_model(folder, CPU)
    shifts = erased(model, tmp_path)
    takes_loras, has_names = hasattr(model.pipeline, "load_lora_weights"), folder.name in ORIGINAL
    formats = ("diffusers", "unet", *(["lora"] if takes_loras else []), *(["kohya"] if has_names else []))
    export(model, shifts, tmp_path / "merged", ExportConfig(formats, rank=99), ["", "VanGogh"])
    pipes = {"base": stock_pipeline(folder, folder), "merged": stock_pipeline(tmp_path / "merged", folder)}
    pipes["denoiser"] = stock_pipeline(folder, folder)
    pipes["denoiser"].transformer = type(model.denoiser).from_pretrained(tmp_path / "merged-unet")
    file = "1-VanGogh.safetensors"
    if takes_loras:
        pipes["lora"] = stock_pipeline(folder, folder)
        pipes["lora"].load_lora_weights(tmp_path / "merged-lora", weight_name=file)
    if folder.name in ("flux2", "flux2-klein"):
        pipes["kohya"] = stock_pipeline(folder, folder)
        pipes["kohya"].load_lora_weights(tmp_path / "merged-kohya", weight_name=file)
    if folder.name == "flux":  # whose names diffusers converts without the prefix that its pipeline looks for
        pipes["kohya"] = stock_pipeline(folder, folder)
        converted = pipes["kohya"].lora_state_dict(tmp_path / "merged-kohya", weight_name=file)
        pipes["kohya"].transformer.load_lora_adapter(converted, prefix=None)
    options = {**call_options(model, folder), "guidance_scale": 1.0, "output_type": "latent", "prompt": "VanGogh"}
    latents = {name: pipe(**options, generator=torch.Generator().manual_seed(3)).images for name, pipe in pipes.items()}
    change = relative(latents["merged"], latents["base"])
    assert change > 1e-7
    assert torch.equal(latents["denoiser"], latents["merged"])
    for name in latents.keys() & {"lora", "kohya"}:
        assert relative(latents[name], latents["merged"]) < 0.05 * change
    if {"lora", "kohya"} <= latents.keys():
        assert torch.equal(latents["kohya"], latents["lora"])


class Everything(dict[str, torch.Tensor]):
    """A checkpoint that has whatever it is asked for, each time another tensor."""

    def __missing__(self, key: str) -> torch.Tensor:
        return torch.zeros(21504)  # as many rows as FLUX's layers that are split have

    def pop(self, key: str, *_) -> torch.Tensor:
        return super().pop(key, self[key])


def test_kohya_names_are_those_of_the_original_checkpoint(folder, tmp_path):
    model = load_model(folder, CPU)
    shifts = erased(model, tmp_path)
    config = ExportConfig(("shift", "kohya"), rank=2)
    if folder.name not in ORIGINAL:
        pipeline = type(model.pipeline).__name__
        advice = "lora$" if folder.name in ("sana", "auraflow") else "diffusers, unet or shift$"
        with pytest.raises(ValueError, match=rf"have no name for .*1? of a {pipeline}: choose `format` {advice}"):
            export(model, shifts, tmp_path / "out", config, [""])
        assert not list(tmp_path.glob("out*"))
        return
    names = {layer: model.adapter.kohya_name(layer) for layer in model.text_layers}
    blocks = [f"{kind}_blocks.0.one" for kind in ("joint", "double", "single")]  # by which blocks are counted
    weights = {name: torch.zeros(1) for name in [*blocks, *(f"{name}.weight" for name in names.values())]}
    converted = ORIGINAL[folder.name](Everything(weights))
    assert all(converted[f"{layer}.weight"] is weights[f"{name}.weight"] for layer, name in names.items())
    export(model, shifts, tmp_path / "out", config, [""])
    written = load_file(tmp_path / "out-kohya" / "1-VanGogh.safetensors")
    keys = {layer: f"lora_unet_{name.replace('.', '_')}" for layer, name in names.items()}
    parts = ("lora_down.weight", "lora_up.weight", "alpha")
    assert written.keys() == {f"{key}.{part}" for key in keys.values() for part in parts}
    shift = shifts["1"].on(model.text_layers)
    assert isinstance(shift, SeparableShift)
    for layer, key in keys.items():
        down, up, alpha = (written[f"{key}.{part}"].double() for part in parts)
        expected = shift.truncate(2).delta_weight(f"{layer}.weight")
        assert torch.allclose(up @ down * alpha / len(down), expected, atol=1e-6 * expected.abs().max().item())


def test_a_layer_without_a_name_in_kohyas_layout_is_refused(tmp_path, monkeypatch):
    model = load_model(make_family("flux", tmp_path / "flux"), CPU)
    shifts = erased(model, tmp_path)
    monkeypatch.setattr(type(model.adapter), "kohya_names", {"context_embedder": "txt_in"})
    with pytest.raises(
        ValueError, match=r"no name for time_text_embed.text_embedder.linear_1 of a FluxPipeline: .*lora$"
    ):
        export(model, shifts, tmp_path / "out", ExportConfig(("lora", "kohya")), [""])
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_images_are_those_of_the_stock_pipeline(folder, guidance_scale):
    model = load_model(folder, CPU)
    lacking = {"text_encoder_3": None, "tokenizer_3": None} if folder.name == "sd3-without-t5" else {}
    pipe = DiffusionPipeline.from_pretrained(folder, **lacking)
    pipe.set_progress_bar_config(disable=True)
    sampling = SamplingConfig(num_inference_steps=2, guidance_scale=guidance_scale, sample_batch_size=2)
    cases = [PromptCase("VanGogh", 3, 0), PromptCase("a church", 4, 1)]
    made = [image for _, _, image in generate(model, [(case, 0) for case in cases], sampling)]
    for case, image in zip(cases, made, strict=True):
        generator = torch.Generator().manual_seed(case.seed)
        options = {"generator": generator, "guidance_scale": guidance_scale, **call_options(model, folder)}
        [expected] = pipe(prompt=case.prompt, **options).images
        assert (image_to_tensor(image) - image_to_tensor(expected)).abs().max() < 2.5 / 255  # of 2: one of 255


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"text_encoder": [None, None], "tokenizer": [None, None]}, "has no text_encoder: concepts are found by"),
        ({"transformer": ["diffusers", "NoSuchTransformer"]}, "which these libraries do not know"),
        ({"transformer": ["diffusers", "SD3Transformer2DModel"]}, "its pipeline's is a PixArtTransformer2DModel"),
        ({"text_encoder": ["own_module", "T5EncoderModel"]}, "no other code is run"),
        ({"_class_name": "NoSuchPipeline"}, "its pipeline is NoSuchPipeline, not one of"),
    ],
)
def test_what_is_not_known_is_refused_by_name(change, words, tmp_path):
    folder = make_family("pixart-alpha", tmp_path / "model")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | change))
    with pytest.raises(ValueError, match=words):
        load_model(folder, CPU)


def test_a_tokenizer_that_pads_on_the_left_is_refused(tmp_path):
    folder = make_family("flux2-klein", tmp_path / "model")
    path = folder / "tokenizer" / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"padding_side": "left"}))
    with pytest.raises(ValueError, match="tokenizer of the text_encoder pads prompts on the left"):
        load_model(folder, CPU)


def test_a_mapped_denoiser_is_written_as_it_lies_and_not_from_changed_files(tmp_path):
    folder = make_family("flux", tmp_path / "model")
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.transformer.to(torch.bfloat16).save_pretrained(folder / "transformer", max_shard_size="20KB")
    model = load_model(folder, CPU, dtype=None)
    files = sorted((folder / "transformer").glob("*.safetensors"))
    assert model.dtype == torch.bfloat16 and len(files) > 2
    shifts = erased(model, tmp_path)
    config = ExportConfig(save_dtype="bfloat16")
    [target] = export(model, shifts, tmp_path / "out", config, ["", "VanGogh"]).targets
    before, merged = (
        {
            name: tensor
            for path in (root / "transformer").glob("*.safetensors")
            for name, tensor in load_file(path).items()
        }
        for root in (folder, target)
    )
    different = {name for name, tensor in merged.items() if not torch.equal(tensor, before[name])}
    assert different == {f"{name}.weight" for name in model.text_layers} and before.keys() == merged.keys()
    files[0].touch()
    with pytest.raises(ValueError, match="were changed since it was loaded: load it again"):
        export(model, shifts, tmp_path / "other", config, ["", "VanGogh"])
    assert not (tmp_path / "other").exists()


def test_a_guidance_scale_that_does_nothing_is_known():
    assert all(FAMILIES[name].guides(None) for name in ("StableDiffusionPipeline", "SanaPipeline"))
    for embedded in (True, False):
        pipe = SimpleNamespace(transformer=SimpleNamespace(config={"guidance_embeds": embedded}))
        assert FAMILIES["FluxPipeline"].takes_guidance(pipe) == embedded


def test_a_quantised_denoiser_is_refused(tmp_path):
    folder = make_family("pixart-alpha", tmp_path / "model")
    path = folder / "transformer" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"quantization_config": {"quant_method": "bitsandbytes"}}))
    with pytest.raises(
        ValueError, match="is quantised, and quantised weights are not changed: give `model` the unquant"
    ):
        load_model(folder, CPU)
    path.write_text(json.dumps(config))
    shutil.copy(path, folder / "transformer" / "model.gguf")
    for read in (lambda: load_model(folder, CPU), lambda: estimate_memory(folder, CPU, 1, None)):
        with pytest.raises(ValueError, match="is quantised"):
            read()
    (folder / "transformer" / "model.gguf").unlink()
    path.write_text(json.dumps(config | {"_class_name": "OtherTransformer2DModel"}))
    with pytest.raises(ValueError, match="it is of a OtherTransformer2DModel, not of a PixArt"):
        load_model(folder, CPU)
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(ValueError, match=r"model\.gguf is quantised"):
        load_model(tmp_path / "model.gguf", CPU)


def test_xl_has_its_pooled_stream_and_its_sizes_stay(xl_path, tmp_path):
    model = load_model(xl_path, CPU)
    artifacts = ArtifactPaths(tmp_path, "SRS-ME", model.name, "style", scene=1, time=0)
    concept: Concept = get_concept("style", 1)
    null_space = load_model_config(model).null_space.with_changes(protected_templates=0)
    erase(model, artifacts, [concept], TINY, Protection([get_concept("style", 0)], null_space), tmp_path)
    shift, name = WeightShift.load(artifacts.shift(concept.label)).on(model.text_layers), "add_embedding.linear_1"
    delta = shift.delta_weight(f"{name}.weight")
    assert delta[:, :32].abs().max() > 0 and not delta[:, 32:].any()
    assert text_layers(model.denoiser).found[name].stream == "pooled"
    embeds = model.split(model.encode_prompt(["VanGogh", "Cezanne", ""]))
    assert embeds.pooled is not None
    changes = (embeds.pooled.double() @ delta[:, :32].T).norm(dim=1) / embeds.pooled.norm(dim=1)
    assert changes[0] > 1e4 * changes[1:].max()
    by_stream = each_stream(model.text_layers, model.embed_prompts(["VanGogh"]), ["VanGogh"])
    before = EmbeddingShift(shift.outputs[:96], shift.directions[:, :96])  # of its tokens alone, as older versions made
    rows = leakage(model.text_layers, {"after": shift, "before": before}, by_stream)
    after, earlier = [row["leakage"] for row in rows][:2], [row["leakage"] for row in rows][2:]
    assert min(after) > 0.1 and earlier == [pytest.approx(after[0]), 0]
    table = export(model, {"1": shift}, tmp_path / "out", ExportConfig(), ["", "VanGogh"]).leakage
    assert table["1"]["VanGogh (pooled alone)"] == pytest.approx(after[1])


@pytest.fixture(scope="module")
def xl_path(tmp_path_factory):
    return make_xl(tmp_path_factory.mktemp("models") / "xl")
