"""`ConceptEraser(pipe, form="linear")`: which weights change, what keeps every bit, and what is refused."""

import warnings
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import remove_hook_from_module
from conftest import make_xl
from diffusers import (
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
)
from diffusers import StableDiffusionXLPipeline as XLPipeline
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from torch import nn

from ldm import ConceptEraser
from ldm.config.concepts import always_protected_prompts, find_by_name
from ldm.config.everyday import everyday_captions
from ldm.config.methods import NullSpaceConfig
from ldm.diffusion import in_place
from ldm.diffusion.load import silence_hf_logging
from ldm.diffusion.text_layers import text_layers
from ldm.erasure.initial_shift import initial_shift
from ldm.erasure.merge import merge
from ldm.erasure.null_space import NullSpaceBasis
from ldm.erasure.pipeline_linear import LinearPipelineEraser
from ldm.erasure.retain import RetainSet
from ldm.io.errors import Notice
from ldm.io.tensors import tensor_digest

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is not all erased"),  # random text encoders know no artist
    pytest.mark.filterwarnings("ignore:__array__ implementation"),  # diffusers' schedulers, of numpy
]
SAYING, OTHER, PROTECTED = "a painting by Picasso", "a photo of a car", "a village by the sea"
LORA = LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v"], init_lora_weights=False)


@pytest.fixture(scope="module", autouse=True)
def silent():
    silence_hf_logging()


def load(folder, kind=StableDiffusionPipeline):
    pipe = kind.from_pretrained(folder, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def pipe(tiny_path):
    return load(tiny_path)


@pytest.fixture
def eraser(pipe) -> LinearPipelineEraser:
    return ConceptEraser(pipe, form="linear")


def image(pipe, prompt=SAYING, **settings):
    generator = torch.Generator().manual_seed(0)
    arguments = {"num_inference_steps": 2, "generator": generator, "output_type": "np", **settings}
    return torch.as_tensor(pipe(prompt, **arguments).images)


def weights(pipe) -> dict[str, torch.Tensor]:
    return {name: layer.weight.detach().clone() for name, layer in text_layers(pipe.unet).items()}


def all_weights(pipe) -> str:
    parts = ("unet", "vae", "text_encoder")
    return tensor_digest(
        {f"{part}.{name}": value for part in parts for name, value in getattr(pipe, part).state_dict().items()}
    )


def same(one, other) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# What changes, and what is put back


def test_text_layers_change_where_they_lie_and_restored_they_have_their_own_bits(pipe, eraser):
    before, digest, own = weights(pipe), all_weights(pipe), image(pipe)
    others = {name: value.clone() for name, value in pipe.unet.state_dict().items() if "attn2.to_" not in name}
    addresses = [parameter.data_ptr() for parameter in pipe.unet.parameters()]
    eraser.erase(["Picasso", "a red fox"], kind={"a red fox": "object"})
    both = weights(pipe)
    assert all(not torch.equal(both[name], before[name]) for name in before)
    assert all(torch.equal(pipe.unet.state_dict()[name], value) for name, value in others.items())
    assert [parameter.data_ptr() for parameter in pipe.unet.parameters()] == addresses
    assert all(parameter.requires_grad for parameter in pipe.unet.parameters())
    assert not torch.equal(image(pipe), own) and "encode_prompt" not in vars(pipe)
    eraser.restore(" PICASSO ")
    assert eraser.erased == ["a red fox"] and not same(weights(pipe), both) and not same(weights(pipe), before)
    eraser.erase("Picasso")
    assert same(weights(pipe), both)
    eraser.restore(["Picasso", "a red fox"])
    assert all_weights(pipe) == digest and torch.equal(image(pipe), own) and eraser.erased == []


def test_protected_prompts_stay_and_the_concept_goes_towards_its_anchor(pipe, eraser):
    kept, other = image(pipe, PROTECTED), image(pipe, OTHER)
    reports = eraser.erase("Picasso", protect=[PROTECTED], anchor="a car")
    report = reports["Picasso"]
    assert report["max_leakage_protected"] < 1e-5 and report["target_change"] > 0.01 and report["distance_left"] < 1
    assert torch.allclose(image(pipe, PROTECTED), kept, atol=1e-3)
    assert (image(pipe, OTHER) - other).abs().max() > (image(pipe, PROTECTED) - kept).abs().max()
    table = eraser.report()
    assert table.to_dict("records") == [{"concept": "Picasso", "kind": "style", "anchor": "a car", **report}]
    assert eraser.erase(["pablo picasso"], protect=PROTECTED, anchor="a car") == {}


def test_the_shift_is_that_of_the_scripts(pipe, eraser, tiny):
    concept = find_by_name("style", "Picasso")
    assert concept is not None
    eraser.erase("Picasso")
    prompts = always_protected_prompts()
    basis = NullSpaceBasis.fit(list(tiny.embed_prompts(prompts).values()), prompts)
    shift = initial_shift(tiny, replace(concept, name="Picasso"), eraser.config, basis, RetainSet(tiny, []))
    for name, weight in merge(tiny.denoiser, [shift]).items():
        assert torch.allclose(pipe.unet.get_parameter(name), weight, atol=1e-5)


def test_original_is_the_unedited_pipeline_nested_and_under_exceptions(pipe, eraser):
    own, base = image(pipe), weights(pipe)
    with eraser.original():
        assert same(weights(pipe), base)
    eraser.erase("Picasso")
    edited = weights(pipe)
    with eraser.original():
        assert torch.equal(image(pipe), own) and same(weights(pipe), base)
        with pytest.raises(KeyError), eraser.original():
            assert torch.equal(image(pipe), own)
            raise KeyError
        assert torch.equal(image(pipe), own)
        eraser.erase("VanGogh")
        assert same(weights(pipe), base) and eraser.erased == ["Picasso", "VanGogh"]
    assert not torch.equal(image(pipe), own) and not same(weights(pipe), edited)
    with eraser.original():
        eraser.restore("VanGogh")
    assert not torch.equal(image(pipe), own)
    eraser.restore("Picasso")
    eraser.erase("Picasso")
    assert not torch.equal(image(pipe), own)
    with eraser.original():
        eraser.restore("Picasso")
    assert same(weights(pipe), base) and torch.equal(image(pipe), own)


def test_an_error_or_an_interrupt_leaves_all_as_it_was(pipe, eraser, monkeypatch):
    eraser.erase("Picasso")
    edited = weights(pipe)
    first, written, copy = next(iter(text_layers(pipe.unet))), [], in_place._copy

    def interrupted(merged, layers):
        layers[first].weight.data.copy_(merged[first])
        written.append(first)
        if len(written) == 1:
            raise KeyboardInterrupt
        copy(merged, layers)

    monkeypatch.setattr(in_place, "_copy", interrupted)
    with pytest.raises(KeyboardInterrupt):
        eraser.restore("Picasso")
    monkeypatch.undo()
    assert same(weights(pipe), edited) and eraser.erased == ["Picasso"]
    with pytest.raises(ValueError, match="protect fewer"):
        eraser.erase("VanGogh", protect=everyday_captions(20))
    assert same(weights(pipe), edited) and eraser.erased == ["Picasso"]
    eraser.null_space = NullSpaceConfig(rank_rtol=0.3)
    eraser.erase("VanGogh", protect=everyday_captions(20))


# LoRAs


def add_lora(pipe) -> None:
    torch.manual_seed(0)
    pipe.unet.add_adapter(LORA)


def lora_file(pipe, folder):
    """Write a LoRA of a copy of a pipeline's U-Net as diffusers do."""
    copied = deepcopy(pipe)
    add_lora(copied)
    tensors = convert_state_dict_to_diffusers(get_peft_model_state_dict(copied.unet))
    StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=tensors)
    return folder


def test_a_lora_before_and_one_after_give_the_same_weights_and_restore_the_same_bits(tiny_path):
    results = []
    for lora_is_first in (True, False):
        pipe = load(tiny_path)
        own, base = image(pipe), weights(pipe)
        eraser = ConceptEraser(pipe, form="linear")
        if lora_is_first:
            add_lora(pipe)
            eraser.erase("Picasso")
        else:
            eraser.erase("Picasso")
            add_lora(pipe)
        assert len(text_layers(pipe.unet)) == len(base) and not same(weights(pipe), base)
        results.append((weights(pipe), image(pipe)))
        with eraser.original():
            results[-1] += (image(pipe),)
        eraser.restore("Picasso")
        results[-1] += (image(pipe),)
        assert same(weights(pipe), base)
        pipe.unload_lora_weights()
        assert torch.equal(image(pipe), own)
    assert same(results[0][0], results[1][0])
    for one, other in zip(results[0][1:], results[1][1:], strict=True):
        assert torch.equal(one, other)
    assert torch.equal(results[0][2], results[0][3]) and not torch.equal(results[0][1], results[0][2])


@pytest.mark.parametrize("kind", [DPMSolverMultistepScheduler, EulerDiscreteScheduler])
def test_five_lines_in_a_notebook(pipe, tmp_path, kind):
    pipe.load_lora_weights(lora_file(pipe, tmp_path))
    pipe.scheduler = kind.from_config(pipe.scheduler.config)
    own = image(pipe)
    eraser = ConceptEraser(pipe, form="linear")
    eraser.erase(["Picasso"], protect=[PROTECTED])
    erased = image(pipe)
    eraser.restore(["Picasso"])
    assert torch.equal(image(pipe), own) and not torch.equal(erased, own)


def test_a_fused_lora_is_refused_and_taken_out_again_all_goes_on(pipe, eraser):
    base = weights(pipe)
    eraser.erase("Picasso")
    add_lora(pipe)
    pipe.fuse_lora()
    fused = weights(pipe)
    for change in (lambda: eraser.restore("Picasso"), lambda: eraser.erase("VanGogh"), eraser.original().__enter__):
        with pytest.raises(ValueError, match=r"are not as they were left .* `fuse_lora`.*: undo that first") as caught:
            change()
        assert "\n" not in str(caught.value) and same(weights(pipe), fused) and eraser.erased == ["Picasso"]
    pipe.unfuse_lora()
    eraser.restore("Picasso")
    assert same(weights(pipe), base)
    pipe.fuse_lora()
    fused = weights(pipe)
    eraser.erase("Picasso")
    assert not same(weights(pipe), fused)
    eraser.restore("Picasso")
    assert same(weights(pipe), fused)


# What a pipeline does beside


@pytest.mark.slow
def test_nothing_is_compiled_again_when_concepts_come_and_go(pipe, eraser):
    compiled = []

    def counting(graph, _):
        compiled.append(graph)
        return graph.forward

    torch._dynamo.reset()
    plain = deepcopy(pipe)
    pipe.unet = torch.compile(pipe.unet, backend=counting)
    own = image(pipe)
    number = len(compiled)
    assert number
    eraser.erase("Picasso")
    erased = image(pipe)
    with eraser.original():
        assert torch.equal(image(pipe), own)
    assert torch.equal(image(pipe), erased)
    eraser.restore("Picasso")
    assert torch.equal(image(pipe), own) and len(compiled) == number
    other = ConceptEraser(plain, form="linear")
    other.erase("Picasso")
    assert torch.allclose(erased, image(plain), atol=1e-4) and not torch.allclose(erased, own, atol=1e-4)


def test_model_offloading_goes_on_and_what_moves_weights_out_of_reach_is_refused(pipe, eraser):
    own, base = image(pipe), weights(pipe)
    pipe.enable_model_cpu_offload(device="cpu")
    eraser.erase("Picasso")
    assert not torch.equal(image(pipe), own)
    pipe.maybe_free_model_hooks()
    eraser.restore("Picasso")
    assert same(weights(pipe), base) and torch.equal(image(pipe), own)
    pipe.remove_all_hooks()
    eraser.erase("Picasso")
    erased = image(pipe)
    cpu_offload(pipe.unet, torch.device("cpu"))  # as sequential offloading does with each part
    assert torch.equal(image(pipe), erased)
    message = "not where they could be changed, as by `enable_sequential_cpu_offload` .* call `pipe.remove_all_hooks"
    for change in (lambda: eraser.restore("Picasso"), lambda: eraser.erase("VanGogh")):
        with pytest.raises(ValueError, match=message) as caught:
            change()
        assert "\n" not in str(caught.value) and eraser.erased == ["Picasso"]
    remove_hook_from_module(pipe.unet, recurse=True)
    eraser.restore("Picasso")
    assert same(weights(pipe), base) and torch.equal(image(pipe), own)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_pipeline_that_is_rounded_meanwhile_is_restored_as_rounded(tiny_path, dtype):
    pipe, plain = load(tiny_path), load(tiny_path).to(dtype=dtype)
    eraser = ConceptEraser(pipe, form="linear")
    eraser.erase(["Picasso", "VanGogh"])
    pipe.to(dtype=dtype)
    eraser.restore("VanGogh")
    assert not same(weights(pipe), weights(plain))
    eraser.restore("Picasso")
    assert same(weights(pipe), weights(plain))
    eraser.erase("Picasso")
    assert all(weight.dtype == dtype for weight in weights(pipe).values())


@pytest.mark.slow
@pytest.mark.parametrize("first", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("second", [torch.float32, torch.float16, torch.bfloat16])
def test_a_pipeline_that_is_rounded_and_rounded_back_is_restored_as_rounded(tiny_path, first, second):
    pipe, plain = load(tiny_path), load(tiny_path).to(first).to(second).to(torch.float32)
    eraser = ConceptEraser(pipe, form="linear")
    eraser.erase(["Picasso", "VanGogh"])
    pipe.to(first).to(second).to(torch.float32)
    with eraser.original():
        assert same(weights(pipe), weights(plain))
    assert not same(weights(pipe), weights(plain))
    eraser.restore("VanGogh")
    pipe.to(first).to(second)
    eraser.restore("Picasso")
    assert same(weights(pipe), weights(plain.to(first).to(second)))


def test_weights_that_are_rounded_back_and_changed_are_refused_until_that_is_undone(pipe, eraser):
    eraser.erase("Picasso")
    pipe.to(torch.bfloat16).to(torch.float32)
    weight = next(iter(text_layers(pipe.unet).values())).weight
    rounded = weight.detach().clone()
    weight.data += 0.01
    with pytest.raises(ValueError, match="not as they were left"):
        eraser.restore("Picasso")
    weight.data.copy_(rounded)
    eraser.restore("Picasso")
    assert eraser.erased == []


def test_long_prompts_and_embeddings_of_any_origin_are_erased_too(pipe, eraser):
    embeds = pipe.encode_prompt(SAYING, "cpu", 1, True)
    settings = {"prompt_embeds": embeds[0], "negative_prompt_embeds": embeds[1]}
    long = {name: torch.cat([value, value], dim=1) for name, value in settings.items()}
    own = [image(pipe, None, **settings), image(pipe, None, **long), image(pipe, f"{SAYING}, " * 10)]
    eraser.erase("Picasso")
    erased = [image(pipe, None, **settings), image(pipe, None, **long), image(pipe, f"{SAYING}, " * 10)]
    assert not any(torch.equal(one, other) for one, other in zip(own, erased, strict=True))


def test_a_lora_that_is_fused_while_nothing_is_erased_counts_as_the_pipelines_own(pipe, eraser):
    with pytest.raises(ValueError, match="protect fewer"):
        eraser.erase("VanGogh", protect=everyday_captions(20))
    add_lora(pipe)
    pipe.fuse_lora()
    fused = weights(pipe)
    with eraser.original():
        eraser.erase("Picasso")
        eraser.restore("Picasso")
    pipe.unfuse_lora()
    eraser.erase("Picasso")
    eraser.restore("Picasso")
    pipe.fuse_lora()
    assert all(torch.allclose(weights(pipe)[name], fused[name], atol=1e-5) for name in fused)


def test_shifts_are_made_anew_where_the_text_encoder_is_another(pipe, eraser):
    eraser.erase("Picasso")
    first = weights(pipe)
    pipe.text_encoder.get_input_embeddings().weight.data.mul_(1.5)
    eraser.erase("Picasso")
    assert eraser.erased == ["Picasso"] and not same(weights(pipe), first)


def test_xl(tmp_path):
    pipe = load(make_xl(tmp_path), XLPipeline)
    own, base = image(pipe), weights(pipe)
    eraser = ConceptEraser(pipe, form="linear")
    assert eraser.erase("Picasso", kind="style")["Picasso"]["max_leakage_protected"] < 1e-4
    assert not torch.equal(image(pipe), own)
    eraser.restore("Picasso")
    assert torch.equal(image(pipe), own) and same(weights(pipe), base)


# Several erasers, and what is refused


def test_one_eraser_for_a_pipeline_and_none_for_another_with_its_unet(pipe, eraser):
    eraser.erase("Picasso")
    assert ConceptEraser(pipe) is eraser and ConceptEraser(pipe, form="linear") is eraser
    with pytest.raises(ValueError, match="Picasso are erased from this pipeline in the `form` linear: restore them"):
        ConceptEraser(pipe, form="gated")
    with pytest.raises(ValueError, match="is none of gated, linear"):
        ConceptEraser(pipe, form="static")  # pyright: ignore[reportCallIssue, reportArgumentType] - what is refused
    relative = StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    with pytest.raises(ValueError, match="is another one's too, from which Picasso are erased") as caught:
        ConceptEraser(relative, form="linear").erase("VanGogh")
    assert "\n" not in str(caught.value)
    copied = deepcopy(pipe)
    ConceptEraser(copied).restore("Picasso")
    assert eraser.erased == ["Picasso"] and not same(weights(copied), weights(pipe))
    eraser.restore("Picasso")
    assert same(weights(copied), weights(pipe))
    ConceptEraser(relative, form="linear").erase("VanGogh")


@pytest.mark.slow
@pytest.mark.parametrize("form", ["gated", "linear"])
def test_of_two_erasers_that_were_made_beforehand_one_erases(pipe, eraser, form):
    other = ConceptEraser(pipe, form=form)
    eraser.erase("Picasso")
    with pytest.raises(ValueError, match="another eraser of this pipeline has erased Picasso: erase by that one"):
        other.erase("a red fox")
    assert ConceptEraser(pipe) is eraser and other.erased == [] and "encode_prompt" not in vars(pipe)
    eraser.restore("Picasso")
    other.erase("a red fox")
    assert ConceptEraser(pipe) is other


def quantize(pipe) -> None:
    layer = next(iter(text_layers(pipe.unet).values()))
    layer.weight = nn.Parameter(layer.weight.data.to(torch.int8), requires_grad=False)


def offload_groups(pipe) -> None:
    pipe.unet.enable_group_offload(torch.device("cpu"), torch.device("cpu"), offload_type="leaf_level")


def learn(pipe) -> None:
    pipe.eraser.config = pipe.eraser.config.with_changes(mode="learn")


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (quantize, "are quantized, and cannot be changed: use the form gated"),
        (lambda pipe: pipe.fuse_qkv_projections(vae=False), "call `pipe.unfuse_qkv_projections"),
        (offload_groups, "not where they could be changed, as by .* `enable_group_offload`"),
        (learn, "set `mode` closed_form"),
    ],
)
def test_what_cannot_be_changed_is_refused_by_name(pipe, eraser, prepare, message):
    pipe.eraser = eraser
    prepare(pipe)
    with pytest.raises(ValueError, match=message) as caught:
        eraser.erase("Picasso")
    assert "\n" not in str(caught.value) and eraser.erased == []


def test_a_concept_of_which_much_is_left_is_said_to_be(pipe, eraser, monkeypatch):
    with warnings.catch_warnings():
        warnings.simplefilter("error", Notice)
        monkeypatch.setattr("ldm.erasure.pipeline_eraser.MAX_DISTANCE_LEFT", {"linear": 2.0})
        left = eraser.erase("Picasso")["Picasso"]["distance_left"]
    eraser.restore("Picasso")
    monkeypatch.setattr("ldm.erasure.pipeline_eraser.MAX_DISTANCE_LEFT", {"linear": left - 0.01})
    with pytest.warns(Notice, match=rf"'Picasso' is not all erased: its prompts have {left:.2f} of the way"):
        eraser.erase("Picasso")
