"""`ConceptEraser(pipe)` for a pipeline of every family: what changes in each form, and what keeps every bit."""

import warnings
from copy import deepcopy

import pytest
import torch
from diffusers import (
    AuraFlowPipeline,
    ChromaPipeline,
    DiffusionPipeline,
    FluxImg2ImgPipeline,
    FluxPipeline,
    SanaSprintPipeline,
    StableDiffusion3Img2ImgPipeline,
)
from families import MAKERS, make_family
from peft import LoraConfig
from torch import nn

from ldm import ConceptEraser
from ldm.config.methods import GateConfig
from ldm.diffusion.families import FAMILIES
from ldm.diffusion.text_layers import text_layers
from ldm.erasure.pipeline_gated import GatedPipelineEraser
from ldm.io.errors import Notice
from ldm.io.paths import REPO_ROOT
from ldm.metrics.classify import find_classifier

pytestmark = [
    pytest.mark.usefixtures("quick_fits"),
    pytest.mark.filterwarnings("ignore:no gate tells"),  # of random text encoders
    pytest.mark.filterwarnings("ignore:.*is not all erased"),
    pytest.mark.filterwarnings("ignore:VanGogh. other prompts come within"),
    pytest.mark.filterwarnings("ignore:__array__ implementation"),  # diffusers' schedulers, of numpy
]
SMALL = GateConfig(retain_captions=40, retain_words=40, compositions=10, word_lists=10, misspellings=10)
SAYING, OTHER, KEPT = "VanGogh", "a photo of a church", "Cezanne"
_MASKED = ("pixart-alpha", "pixart-sigma", "sana", "auraflow", "lumina2")
_FEW_TOKENS = 40  # that Sana reads in these tests, of 300


def load(folder):
    lacking = {"text_encoder_3": None, "tokenizer_3": None} if folder.name == "sd3-without-t5" else {}
    pipe = DiffusionPipeline.from_pretrained(folder, **lacking)
    pipe.set_progress_bar_config(disable=True)
    if folder.name == "sana":
        pipe.tokenizer.model_max_length = _FEW_TOKENS
    for name in ("text_encoder", "text_encoder_2"):
        if folder.name.startswith("sd3"):  # so that its random states tell tokens apart
            getattr(pipe, name).get_input_embeddings().weight.data.mul_(10)
    return pipe


FAMILY_NAMES = [name for name in MAKERS if name not in ("pixart-sigma", "sana")]
SLOW = pytest.param("sana", marks=pytest.mark.slow)  # which reads a long text before each prompt


@pytest.fixture(scope="module", params=[*FAMILY_NAMES, SLOW])
def folder(request, tmp_path_factory):
    return make_family(request.param, tmp_path_factory.mktemp("families") / request.param)


@pytest.fixture(scope="module")
def plain(folder):
    return load(folder)


@pytest.fixture(scope="module")
def fitted(folder) -> GatedPipelineEraser:
    eraser = ConceptEraser(load(folder))
    eraser.config = SMALL
    eraser.erase(SAYING, kind="style", protect=OTHER)
    return eraser


@pytest.fixture
def pipe(fitted):
    return fitted._pipe


def options(pipe) -> dict:
    """Return the options of a call that reads as many tokens as the tokenizer takes."""
    family = FAMILIES[type(pipe).__name__]
    side = {"height": family.image_size(pipe), "width": family.image_size(pipe)}
    return {**side, **family.call_options, **family.prompt_options(pipe), "num_inference_steps": 2}


def image(pipe, prompt=SAYING, **settings):
    arguments = {**options(pipe), "generator": torch.Generator().manual_seed(0), "output_type": "np", **settings}
    return torch.as_tensor(pipe(prompt=prompt, **arguments).images)


def same(one, other) -> list[bool]:
    return [torch.equal(first, second) for first, second in zip(one, other, strict=True)]


@torch.no_grad()
def encode(pipe, prompts, negative=None, **settings) -> dict:
    """Return what `encode_prompt` returns, by name."""
    family = FAMILIES[type(pipe).__name__]
    given = {"prompt_2": None, "prompt_3": None, "do_classifier_free_guidance": negative is not None}
    given |= {"negative_prompt": negative} if negative is not None else {}
    known = {name: value for name, value in given.items() if name in type(pipe).encode_prompt.__code__.co_varnames}
    returned = pipe.encode_prompt(prompts, **known, **family.prompt_options(pipe), **settings)
    return dict(zip(family.outputs, returned, strict=True))


# The form gated


def test_images_change_with_their_prompts_alone(plain, pipe, fitted):
    own, other = image(plain), image(plain, OTHER)
    with warnings.catch_warnings():
        warnings.simplefilter("error", Notice)
        assert torch.equal(image(pipe, OTHER), other) and not torch.equal(image(pipe), own)
    with fitted.original():
        assert torch.equal(image(pipe), own)
    assert not torch.equal(image(pipe), own)
    fitted.restore("all")
    assert torch.equal(image(pipe), own) and "encode_prompt" not in vars(pipe)
    fitted.erase(SAYING, kind="style", protect=OTHER)
    assert not torch.equal(image(pipe), own)


def test_each_of_several_images_of_several_prompts(plain, pipe, folder):
    prompts, settings = [OTHER, SAYING], {"num_images_per_prompt": 2}
    before, after = encode(plain, prompts, **settings), encode(pipe, prompts, **settings)
    for name, output in before.items():
        if name.endswith("prompt_embeds") and output is not None:
            assert same(output, after[name]) == [True, True, False, False]
            assert torch.equal(after[name][2], after[name][3])
        else:
            assert output is None or torch.equal(output, after[name])
    single = encode(pipe, SAYING)
    assert torch.allclose(after["prompt_embeds"][2], single["prompt_embeds"][0], atol=1e-4)
    if folder.name in _MASKED:
        own = encode(plain, SAYING)["prompt_embeds"][0]
        masked = ~own.any(-1) if folder.name == "auraflow" else single["prompt_attention_mask"][0] == 0
        assert masked.any() and torch.equal(single["prompt_embeds"][0][masked], own[masked])
    images = image(pipe, prompts, **settings)
    assert len(images) == 4 and same(images, image(plain, prompts, **settings)) == [True, True, False, False]


def test_negative_prompts_are_erased_too(plain, pipe, folder):
    if folder.name in ("flux2", "flux2-klein"):
        pytest.skip("it takes none")
    if folder.name == "flux":  # which calls `encode_prompt` once more for them
        for negative, is_same in ((SAYING, False), ("a car", True)):
            settings = {"negative_prompt": negative, "true_cfg_scale": 3.0}
            assert torch.equal(image(pipe, OTHER, **settings), image(plain, OTHER, **settings)) == is_same
        return
    prompts, negative, settings = [SAYING, OTHER], [OTHER, SAYING], {"num_images_per_prompt": 2}
    before, after = encode(plain, prompts, negative, **settings), encode(pipe, prompts, negative, **settings)
    kept = {"": [False, False, True, True], "negative_": [True, True, False, False]}
    for side, expected in kept.items():
        name = f"{side}prompt_embeds"
        assert same(before[name], after[name]) == expected
    empty = encode(plain, [SAYING], [""]), encode(pipe, [SAYING], [""])
    assert torch.equal(empty[0]["negative_prompt_embeds"], empty[1]["negative_prompt_embeds"])


def test_embeddings_are_taken_that_the_pipeline_returned_and_no_others(plain, pipe, folder):
    own, foreign = encode(pipe, SAYING, ""), encode(plain, SAYING, "")

    def given(outputs):
        return {name: value for name, value in outputs.items() if value is not None and name != "text_ids"}

    settings = {"negative_prompt": None} if folder.name in ("pixart-alpha", "sana", "lumina2") else {}
    assert torch.equal(image(pipe, None, **given(own), **settings), image(pipe))
    with pytest.raises(ValueError, match="prompt_embeds` do not tell what prompts they are of") as caught:
        image(pipe, None, **given(foreign), **settings)
    assert "\n" not in str(caught.value)


def test_of_other_numbers_of_tokens_gates_are_fitted_anew(plain, pipe, folder):
    settings = {"max_sequence_length": options(pipe)["max_sequence_length"] + 8}
    if folder.name in ("sana", "flux2", "flux2-klein", "lumina2"):
        pytest.skip("it reads long texts around each prompt, which take a while")
    with pytest.warns(Notice, match=r"another way \(.*`max_sequence_length` \d+.* fitting anew what erases VanGogh"):
        assert not torch.equal(image(pipe, **settings), image(plain, **settings))
    with warnings.catch_warnings():
        warnings.simplefilter("error", Notice)
        assert torch.equal(image(pipe, OTHER, **settings), image(plain, OTHER, **settings))


# The form linear


def prediction(pipe, prompt) -> torch.Tensor:
    """Return what the denoiser predicts first in a call, under the prompt, and under negative ones."""
    found: list[torch.Tensor] = []
    hook = pipe.transformer.register_forward_hook(lambda _, inputs, output: found.append(output[0]))
    image(pipe, prompt)
    hook.remove()
    return found[0].float()


def relative(one, other) -> float:
    return ((one - other).norm() / other.norm()).item()


def test_the_denoiser_changes_but_for_protected_prompts_and_is_restored(plain, folder):
    pipe = load(folder)
    eraser = ConceptEraser(pipe, form="linear")
    own, kept = prediction(pipe, SAYING), prediction(pipe, KEPT)
    weights = {name: value.clone() for name, value in pipe.transformer.state_dict().items()}
    report = eraser.erase(SAYING, protect=KEPT, kind="style")[SAYING]
    assert report["max_leakage_protected"] < 1e-5
    leakage = relative(prediction(pipe, KEPT), kept)
    assert leakage < 1e-5 and relative(prediction(pipe, SAYING), own) > 100 * leakage
    with eraser.original():
        assert torch.equal(prediction(pipe, SAYING), own)
    edited = {name for name, value in pipe.transformer.state_dict().items() if not torch.equal(value, weights[name])}
    assert edited == {f"{name}.weight" for name in text_layers(pipe.transformer)}
    eraser.restore("all")
    assert all(torch.equal(value, weights[name]) for name, value in pipe.transformer.state_dict().items())
    assert torch.equal(image(pipe), image(plain))


# What goes by other names, and what is refused


@pytest.fixture(scope="module")
def flux(tmp_path_factory):
    return load(make_family("flux", tmp_path_factory.mktemp("families") / "flux"))


def test_pipelines_that_read_as_a_known_one_are_taken_and_others_refused(flux, tmp_path):
    relative_pipe = FluxImg2ImgPipeline(**{**flux.components, "image_encoder": None, "feature_extractor": None})
    assert type(ConceptEraser(relative_pipe)) is GatedPipelineEraser
    assert ConceptEraser(relative_pipe, form="linear").config == ConceptEraser(flux, form="linear").config
    third = load(make_family("sd3", tmp_path / "sd3"))
    assert type(ConceptEraser(StableDiffusion3Img2ImgPipeline(**third.components))) is GatedPipelineEraser
    aura = load(make_family("auraflow", tmp_path / "auraflow"))
    lacking = {"image_encoder": None, "feature_extractor": None}
    chroma = ChromaPipeline(**{**aura.components, **lacking, "transformer": flux.transformer})
    sprint = SanaSprintPipeline(**load(make_family("sana", tmp_path / "sana")).components)
    for other in (chroma, sprint):
        with pytest.raises(ValueError, match=r"Pipeline does not encode prompts as .*give a pipeline that does, as"):
            ConceptEraser(other)
    blind = AuraFlowPipeline(**{**aura.components, "text_encoder": None, "tokenizer": None})
    half = FluxPipeline(**{**flux.components, "text_encoder": None})
    for name, pipe in (("AuraFlow", blind), ("Flux", half)):
        for form in ("gated", "linear"):
            with pytest.raises(
                ValueError, match=f"this {name}Pipeline has no text encoder and tokenizer, so"
            ) as caught:
                ConceptEraser(pipe, form=form)
            assert "\n" not in str(caught.value)


def test_a_tokenizer_that_pads_on_the_left_is_refused(tmp_path):
    pipe = load(make_family("pixart-alpha", tmp_path / "pixart-alpha"))
    pipe.tokenizer.padding_side = "left"
    with pytest.raises(ValueError, match="tokenizer of the text_encoder pads prompts on the left"):
        ConceptEraser(pipe)


class Codes(nn.Parameter):
    """A weight of a library that quantises, as bitsandbytes, GGUF and torchao have their own."""


def quantize(pipe) -> None:
    pipe.transformer.context_embedder.weight = Codes(pipe.transformer.context_embedder.weight.data, False)


def cast(pipe) -> None:
    pipe.transformer.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)


@pytest.mark.parametrize("prepare", [quantize, cast])
def test_weights_that_are_codes_are_refused(flux, prepare):
    pipe = deepcopy(flux)
    prepare(pipe)
    with pytest.raises(ValueError, match=r"are quantized, and cannot be changed: .* unquantized, .* export a LoRA"):
        ConceptEraser(pipe, form="linear").erase(SAYING, kind="style")


def test_a_lora_that_is_fused_later_is_refused_and_one_that_is_not_stays(flux):
    pipe = deepcopy(flux)
    eraser = ConceptEraser(pipe, form="linear")
    own = image(pipe)
    eraser.erase(SAYING, kind="style")
    pipe.transformer.fuse_qkv_projections()  # which has nothing to do with text layers
    pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["context_embedder"], init_lora_weights=False))
    with_lora = image(pipe)
    pipe.fuse_lora()
    with pytest.raises(ValueError, match=r"are not as they were left .* `fuse_lora`.*: undo that first"):
        eraser.restore("all")
    pipe.unfuse_lora()
    eraser.restore("all")
    assert not torch.equal(image(pipe), with_lora)
    pipe.unload_lora_weights()
    pipe.transformer.unfuse_qkv_projections()
    assert torch.equal(image(pipe), own)


def test_a_prompt_for_one_of_two_text_encoders_is_erased(tmp_path):
    folder = make_family("sd3", tmp_path / "sd3")
    plain, pipe = load(folder), load(folder)
    eraser = ConceptEraser(pipe)
    eraser.config = SMALL
    eraser.erase(SAYING, kind="style", protect=OTHER)
    told = {name for edits in eraser._edits.values() for edit in edits.values() for name in edit.gates}
    assert "text_encoder_3" in told
    settings = {"prompt_3": SAYING}
    assert not torch.equal(image(pipe, OTHER, **settings), image(plain, OTHER, **settings))


# The bundled model


@pytest.mark.slow
@pytest.mark.parametrize("form", ["gated", "linear"])
def test_mini_flux_draws_no_van_gogh_and_all_else_as_before(form):
    settings = {"num_inference_steps": 20, "max_sequence_length": 24, "height": 64, "width": 64}
    saying = ["a church by Vincent van Gogh", "art by Van Gogh", "a golf ball, in the style of van gogh", "Van Gogh"]
    others = ["a church by Picasso", "a man riding a horse on the beach", "", "a white van"]
    pipe = FluxPipeline.from_pretrained(REPO_ROOT / "models" / "mini-flux")
    pipe.set_progress_bar_config(disable=True)
    classifier = find_classifier("style", None, torch.device("cpu"))
    assert classifier is not None

    def shown(prompts):
        images = torch.cat([image(pipe, prompt, **settings) for prompt in prompts])
        return images.permute(0, 3, 1, 2) * 2 - 1

    before, kept = shown(saying), shown(others)
    eraser = ConceptEraser(pipe, form=form)
    if form == "gated":
        eraser.config = GateConfig(retain_captions=400, retain_words=200)
    eraser.erase("Vincent van Gogh", kind="style", protect=others)
    after = shown(saying)
    with torch.no_grad():
        assert (classifier(before).argmax(1) == 2).all() and not (classifier(after).argmax(1) == 2).any()
    if form == "gated":
        assert torch.equal(shown(others), kept)
    else:
        assert (shown(others) - kept).abs().max() < 2.5 / 255  # of 2: one of 255
    eraser.restore("all")
    assert torch.equal(shown(saying), before)
