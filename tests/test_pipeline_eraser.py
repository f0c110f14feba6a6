"""`ConceptEraser(pipe)`: which prompts of a pipeline change, which keep every bit, and what is refused."""

import warnings
from copy import deepcopy
from types import SimpleNamespace

import pytest
import torch
from conftest import make_xl
from diffusers import (
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
)
from diffusers import StableDiffusionXLPipeline as XLPipeline
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig, inject_adapter_in_model
from peft.utils import get_peft_model_state_dict

from ldm import ConceptEraser
from ldm.config.concept_lists import make_concept
from ldm.config.methods import GateConfig
from ldm.diffusion.pipeline_encoder import PipelineEncoder
from ldm.erasure import gate
from ldm.erasure.gate_fitter import GateFitter, InseparableError
from ldm.erasure.pipeline_concepts import Details, new_concepts
from ldm.erasure.pipeline_eraser import PipelineEraser
from ldm.erasure.pipeline_gated import GatedPipelineEraser, _check_protected
from ldm.io.errors import Notice
from ldm.io.paths import REPO_ROOT
from ldm.io.tensors import tensor_digest

pytestmark = [
    pytest.mark.usefixtures("quick_fits"),
    pytest.mark.filterwarnings("ignore:no gate tells"),  # the long names, of which mini-sd's tokenizer knows nothing
    pytest.mark.filterwarnings("ignore:.*is not all erased"),  # nor of an artist
    pytest.mark.filterwarnings("ignore:__array__ implementation"),  # diffusers' schedulers, of numpy
]
SMALL = GateConfig(retain_captions=100, retain_words=60, compositions=20, word_lists=10, misspellings=20)
SAYING = ["a painting by Picasso", "Picasso", "art by Picasso"]
OTHERS = ["", "a photo of a church", "a painting by Cezanne", "a very long caption " * 5, "CCS 2024"]


def load(folder=REPO_ROOT / "models" / "mini-sd", kind=StableDiffusionPipeline):
    pipe = kind.from_pretrained(folder, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def erased_from(pipe, texts="Picasso", config=SMALL, **settings) -> GatedPipelineEraser:
    eraser = ConceptEraser(pipe)
    eraser.config = config
    eraser.erase(texts, **{"kind": "style", **settings})
    return eraser


@pytest.fixture(scope="module")
def plain():
    return load()


@pytest.fixture(scope="module")
def fitted() -> GatedPipelineEraser:
    return erased_from(load(), ["Picasso", "VanGogh"])


@pytest.fixture
def eraser(fitted):
    """Return an eraser of a pipeline from which Picasso and VanGogh are erased, whatever the last test did."""
    if fitted.erased not in ([], ["Picasso", "VanGogh"]):
        fitted.restore(fitted.erased)
    fitted.erase(["Picasso", "VanGogh"], kind="style")
    return fitted


@pytest.fixture
def pipe(eraser):
    return eraser._pipe


def encode(pipe, prompts, **settings):
    arguments = {"device": pipe.device, "num_images_per_prompt": 1, "do_classifier_free_guidance": False}
    return pipe.encode_prompt(prompts, **{**arguments, **settings})


def same_rows(one, other) -> list[bool]:
    return [torch.equal(first, second) for first, second in zip(one, other, strict=True)]


def image(pipe, prompt, **settings):
    generator = torch.Generator().manual_seed(0)
    arguments = {"num_inference_steps": 2, "generator": generator, "output_type": "np", **settings}
    return torch.as_tensor(pipe(prompt, **arguments).images)


def weights(pipe) -> str:
    return tensor_digest(
        {
            f"{part}.{name}": value
            for part in ("unet", "vae", "text_encoder")
            for name, value in getattr(pipe, part).state_dict().items()
        }
    )


# What changes, and what does not


def test_prompts_that_say_an_erased_concept_change_and_all_others_keep_every_bit(plain, pipe):
    prompts = [*OTHERS, *SAYING]
    before, after = encode(plain, prompts)[0], encode(pipe, prompts)[0]
    assert same_rows(before, after) == [True] * len(OTHERS) + [False] * len(SAYING)
    for number, prompt in enumerate(prompts):
        assert torch.allclose(encode(pipe, prompt)[0][0], after[number], atol=1e-5)


def test_images_change_with_their_prompts_alone(plain, pipe):
    for prompt in ("a photo of a church", ["a photo of a car", ""]):
        assert torch.equal(image(pipe, prompt), image(plain, prompt))
    assert not torch.equal(image(pipe, SAYING[0]), image(plain, SAYING[0]))
    relative = StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    assert type(ConceptEraser(relative)) is GatedPipelineEraser and "encode_prompt" not in vars(relative)


def test_each_of_several_images_of_a_prompt_and_its_negative_prompt_are_erased(plain, pipe):
    settings = {"num_images_per_prompt": 3, "do_classifier_free_guidance": True}
    prompts, negative = [OTHERS[1], SAYING[0]], [SAYING[1], OTHERS[2]]
    before = encode(plain, prompts, negative_prompt=negative, **settings)
    after = encode(pipe, prompts, negative_prompt=negative, **settings)
    assert same_rows(before[0], after[0]) == [True] * 3 + [False] * 3
    assert same_rows(before[1], after[1]) == [False] * 3 + [True] * 3
    assert torch.equal(after[0][3], after[0][5]) and torch.equal(after[1][0], after[1][2])
    single = encode(pipe, negative)[0]
    assert torch.allclose(after[1][0], single[0], atol=1e-5)


def test_two_concepts_in_one_prompt_are_one_map(plain, pipe, eraser):
    prompt = "Picasso and VanGogh"
    both = encode(pipe, prompt)[0]
    eraser.restore("VanGogh")
    one = encode(pipe, prompt)[0]
    assert not torch.equal(both, one) and not torch.equal(one, encode(plain, prompt)[0])
    assert both.isfinite().all() and both.norm() < 1.5 * encode(plain, prompt)[0].norm()


def test_restored_the_pipeline_is_what_it_was(plain, pipe, eraser):
    assert eraser.erased == ["Picasso", "VanGogh"] and "encode_prompt" in vars(pipe)
    eraser.restore([" pablo  PICASSO"])  # any spelling
    assert eraser.erased == ["VanGogh"]
    assert torch.equal(encode(pipe, SAYING)[0], encode(plain, SAYING)[0])
    eraser.restore("Van Gogh")
    assert eraser.erased == [] and "encode_prompt" not in vars(pipe)
    assert weights(pipe) == weights(plain) and torch.equal(image(pipe, SAYING[0]), image(plain, SAYING[0]))
    assert not any(module._forward_hooks for module in pipe.text_encoder.modules())


def test_what_is_erased_already_stays_as_it_is(pipe, eraser):
    before = encode(pipe, SAYING)[0]
    assert eraser.erase("  picasso ") == {} and eraser.erase(["Pablo Picasso"]) == {}
    assert eraser.erased == ["Picasso", "VanGogh"] and torch.equal(encode(pipe, SAYING)[0], before)


def test_an_encode_prompt_of_the_users_own_is_kept():
    pipe, calls = load(), []

    def own(*args, **kwargs):
        calls.append(args)
        return type(pipe).encode_prompt(pipe, *args, **kwargs)

    pipe.encode_prompt = own
    eraser = erased_from(pipe)
    calls.clear()
    encode(pipe, "a church")
    assert calls
    eraser.restore("Picasso")
    assert pipe.encode_prompt is own


def test_a_wrapper_that_the_user_adds_later_stays_and_passes_through(plain, pipe, eraser):
    wrapped = pipe.encode_prompt
    pipe.encode_prompt = lambda *args, **kwargs: wrapped(*args, **kwargs)
    assert not torch.equal(encode(pipe, SAYING)[0], encode(plain, SAYING)[0])
    eraser.restore(eraser.erased)
    embeds = encode(pipe, SAYING)[0]
    assert torch.equal(embeds, encode(plain, SAYING)[0])
    assert torch.equal(encode(pipe, None, prompt_embeds=embeds)[0], embeds)
    pipe.encode_prompt = wrapped
    del pipe.encode_prompt


def test_saving_a_pipeline_says_that_what_is_erased_is_not_saved(pipe, eraser, tmp_path):
    with pytest.warns(Notice, match=r"is not saved .*\(Picasso, VanGogh\): .* the `form` linear") as found:
        pipe.save_pretrained(tmp_path / "saved")
    assert found[0].filename == __file__ and weights(load(tmp_path / "saved")) == weights(pipe)
    with warnings.catch_warnings(), eraser.original():
        warnings.simplefilter("error", Notice)
        pipe.save_pretrained(tmp_path / "original")
    eraser.restore("all")
    assert "save_pretrained" not in vars(pipe)
    pipe.save_pretrained = lambda folder: folder
    eraser.erase("Picasso")
    with pytest.warns(Notice, match="Picasso"):
        assert pipe.save_pretrained("mine") == "mine"
    eraser.restore("Picasso")
    assert vars(pipe).pop("save_pretrained")("mine") == "mine"


def test_original_is_the_unedited_pipeline_nested_and_under_exceptions(plain, pipe, eraser):
    erased, own = encode(pipe, SAYING)[0], encode(plain, SAYING)[0]
    assert not torch.equal(erased, own)
    with eraser.original():
        assert torch.equal(encode(pipe, SAYING)[0], own) and torch.equal(
            image(pipe, SAYING[0]), image(plain, SAYING[0])
        )
        with pytest.raises(KeyError), eraser.original():
            assert torch.equal(encode(pipe, SAYING)[0], own)
            raise KeyError
        image(pipe, None, prompt_embeds=own[:1], negative_prompt_embeds=own[1:2])  # its own are as good as any
        assert torch.equal(encode(pipe, SAYING)[0], own)
        eraser.restore("VanGogh")
        eraser.erase("VanGogh", kind="style")
        assert torch.equal(encode(pipe, ["VanGogh"])[0], encode(plain, ["VanGogh"])[0])
    assert torch.equal(encode(pipe, SAYING)[0], erased) and eraser.erased == ["Picasso", "VanGogh"]
    with pytest.raises(ValueError, match="`prompt_embeds` do not tell"):
        image(pipe, None, prompt_embeds=own[:1])


def test_texts_have_kinds_spellings_and_anchors_each_their_own():
    kinds, anchors = {"a red fox": "object", " Anna  Lee ": "person"}, {"a red fox": " a  dog"}
    details = Details(kinds, {"Anna Lee": ["Anna L."]}, anchors)
    found = new_concepts(["a red fox", "Anna Lee", "Picasso", "glass"], details, {})
    assert [concept.kind for concept in found.values()] == ["object", "person", "style", "generic"]
    assert [concept.anchor for concept in found.values()] == ["a dog", None, None, None]
    assert found["a red fox"].spellings == ("red fox", "red fox")
    assert found["Anna Lee"].aliases == ("Anna L.",)
    assert [concept.anchor for concept in new_concepts(["Ann", "Bo"], Details(anchor="x"), {}).values()] == ["x", "x"]
    with pytest.raises(ValueError, match="'the red fox' says 'red fox' too"):
        new_concepts("the red fox", Details(), found)


def test_prompts_become_those_of_the_anchor_that_is_given(plain):
    pipe = load()
    eraser = ConceptEraser(pipe)
    eraser.config = SMALL
    report = eraser.erase("Picasso", anchor={"Picasso": "Cezanne"})["Picasso"]
    for template in ("a painting by {}", "{}", "a landscape by {}"):
        own, aim = (encode(plain, template.format(name))[0] for name in ("Picasso", "Cezanne"))
        edited = encode(pipe, template.format("Picasso"))[0]
        assert ((edited - aim) * (own - aim)).sum() < 0.6 * (own - aim).square().sum()
    row = eraser.report().iloc[0]
    assert (row.concept, row["kind"], row.anchor) == ("Picasso", "style", "Cezanne")
    assert (row.gap, row.distance_left) == (report["gap"], report["distance_left"]) and report["distance_left"] < 0.6
    assert row.false_alarms == "{} of {}".format(*report["false_alarms"])
    with pytest.raises(ValueError, match=r"'Picasso' is erased already: restore it before .* other `anchor`"):
        eraser.erase("Picasso", anchor="Monet")
    eraser.restore("Picasso")
    assert eraser.report().empty and list(eraser.report().columns) == ["concept", "kind", "anchor", *eraser.measured]


@pytest.mark.slow
def test_the_second_time_what_does_not_depend_on_the_concepts_is_known(monkeypatch):
    pipe, counted, encode_states = load(), [], PipelineEncoder.encode_with_states

    def counting(self, prompts, layers):
        counted.extend(prompts)
        return encode_states(self, prompts, layers)

    monkeypatch.setattr(PipelineEncoder, "encode_with_states", counting)
    eraser = erased_from(pipe)
    first, alone = len(counted), next(iter(eraser._edits.values()))
    eraser.erase("VanGogh", kind="style")
    second = counted[first:]
    assert len(second) < 0.7 * first and "a photo of a church" not in second
    assert not set(second) & set(GateFitter(eraser._encoder, [], [], SMALL, eraser._known[1]).texts.captions)
    assert alone.items() < next(iter(eraser._edits.values())).items()  # the first edit is still the same
    pipe.text_encoder.get_input_embeddings().weight.data.mul_(1.05)
    with pytest.warns(Notice, match="fitting anew"):
        check_erased(pipe)
    assert len(counted) > first + len(second) + 0.7 * first


@pytest.mark.slow
def test_hidden_states_are_chosen_anew_where_those_of_before_do_not_tell_a_concept(monkeypatch):
    eraser, fit, refused = erased_from(load()), GateFitter.fit, []

    def fit_at_second_try(self, concept):
        if concept.name == "VanGogh" and not refused:
            refused.append(self)
            raise InseparableError("no gate tells 'VanGogh' from other prompts (...): erase it otherwise")
        return fit(self, concept)

    monkeypatch.setattr(GateFitter, "fit", fit_at_second_try)
    known = eraser._known[1]
    eraser.erase("VanGogh", kind="style")
    assert refused and eraser.erased == ["Picasso", "VanGogh"] and eraser._known[1] is not known


def test_a_concept_of_which_much_is_left_is_said_to_be(eraser, monkeypatch):
    eraser.restore("Picasso")
    monkeypatch.setattr("ldm.erasure.pipeline_eraser.MAX_DISTANCE_LEFT", {"gated": 0.01})
    with pytest.warns(Notice, match=r"'Picasso' is not all erased: its prompts have 0\.\d\d of the way"):
        eraser.erase("Picasso", kind="style")


# Embeddings that the caller passes


def test_embeddings_are_taken_that_the_pipeline_returned_and_no_others(plain, pipe):
    own, foreign = encode(pipe, SAYING)[0], encode(plain, SAYING)[0]
    empty = encode(pipe, [""])[0]
    result = image(pipe, None, prompt_embeds=own[:1].clone(), negative_prompt_embeds=empty)
    assert torch.equal(result, image(pipe, SAYING[:1]))
    assert len(
        image(pipe, None, prompt_embeds=torch.cat([own[1:], empty]), negative_prompt_embeds=empty.repeat(3, 1, 1))
    )
    for wrong in ({"prompt_embeds": foreign[:1]}, {"prompt_embeds": own[:1], "negative_prompt_embeds": foreign[:1]}):
        with pytest.raises(ValueError, match=r"prompt_embeds` do not tell .* Picasso, VanGogh: pass") as caught:
            image(pipe, None, **wrong)
        assert "\n" not in str(caught.value)


def test_embeddings_from_before_something_was_erased_are_refused(pipe, eraser):
    eraser.restore("VanGogh")
    embeds = encode(pipe, ["art by VanGogh"])[0]
    image(pipe, None, prompt_embeds=embeds)
    eraser.erase("VanGogh", kind="style")
    with pytest.raises(ValueError, match="`prompt_embeds` do not tell"):
        image(pipe, None, prompt_embeds=embeds)


def test_of_long_prompts_what_is_read_counts_and_embeddings_may_be_put_together(plain, pipe):
    long = ["Picasso, " + "a red car, " * 20, "a red car, " * 20 + "Picasso"]
    assert same_rows(encode(pipe, long)[0], encode(plain, long)[0]) == [False, True]  # the latter is cut before
    own, other = encode(pipe, [SAYING[0], "a car"])[0].split(1)
    joined = torch.cat([own, other], dim=1)
    settings = {"prompt_embeds": joined, "negative_prompt_embeds": torch.cat([other, other], dim=1)}
    assert not torch.equal(
        image(pipe, None, **settings), image(plain, None, **settings | {"prompt_embeds": joined * 2})
    )
    for wrong in (torch.cat([own, 2 * other], dim=1), torch.cat([encode(plain, SAYING[:1])[0], other], dim=1)):
        with pytest.raises(ValueError, match="`prompt_embeds` do not tell"):
            image(pipe, None, **settings | {"prompt_embeds": wrong})


# What a pipeline does beside


@pytest.mark.slow
@pytest.mark.parametrize("kind", [DPMSolverMultistepScheduler, EulerDiscreteScheduler])
def test_five_lines_in_a_notebook(tmp_path, kind):
    pipe = load()
    copied = deepcopy(pipe)
    copied.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v"], init_lora_weights=False))
    tensors = convert_state_dict_to_diffusers(get_peft_model_state_dict(copied.unet))
    StableDiffusionPipeline.save_lora_weights(tmp_path, unet_lora_layers=tensors)
    pipe.load_lora_weights(tmp_path)
    pipe.scheduler = kind.from_config(pipe.scheduler.config)
    own, other = image(pipe, SAYING[0]), image(pipe, OTHERS[1])
    eraser = ConceptEraser(pipe)
    eraser.config = SMALL
    eraser.erase(["Picasso"], protect=[OTHERS[1]])
    assert not torch.equal(image(pipe, SAYING[0]), own) and torch.equal(image(pipe, OTHERS[1]), other)
    pipe.unload_lora_weights()
    assert not torch.equal(image(pipe, OTHERS[1]), other)
    pipe.load_lora_weights(tmp_path)
    eraser.restore(["Picasso"])
    assert torch.equal(image(pipe, SAYING[0]), own)


@pytest.mark.slow
def test_nothing_is_compiled_again_when_concepts_come_and_go(pipe, eraser):
    compiled, unet = [], pipe.unet

    def counting(graph, _):
        compiled.append(graph)
        return graph.forward

    torch._dynamo.reset()
    pipe.unet = torch.compile(unet, backend=counting)
    erased, number = image(pipe, SAYING[0]), len(compiled)
    with eraser.original():
        assert not torch.equal(image(pipe, SAYING[0]), erased)
    eraser.restore(["Picasso", "VanGogh"])
    image(pipe, SAYING[0])
    eraser.erase(["Picasso", "VanGogh"], kind="style")
    assert torch.equal(image(pipe, SAYING[0]), erased) and number and len(compiled) == number
    pipe.unet = unet


# Text encoders that change


def check_erased(pipe, **settings) -> None:
    """Assert that a pipeline's own embeddings change where prompts say Picasso, and nowhere else."""
    before = type(pipe).encode_prompt(pipe, [*OTHERS, *SAYING], pipe.device, 1, False, **settings)[0]
    after = encode(pipe, [*OTHERS, *SAYING], **settings)[0]
    assert same_rows(before, after) == [True] * len(OTHERS) + [False] * len(SAYING)
    assert after.dtype == before.dtype and after.isfinite().all()


@pytest.mark.slow
def test_gates_are_fitted_anew_where_weights_change_in_place_and_where_a_token_is_added():
    pipe = load()
    eraser = erased_from(pipe)
    with warnings.catch_warnings():
        warnings.simplefilter("error", Notice)
        check_erased(pipe)
    weight = pipe.text_encoder.get_input_embeddings().weight
    before, state = weight.data.clone(), PipelineEncoder.of(pipe).fingerprint()
    weight.data.mul_(1.05)
    with pytest.warns(Notice, match="text encoders are not as they were .*: fitting anew what erases Picasso"):
        check_erased(pipe)
    weight.data.copy_(before)
    assert PipelineEncoder.of(pipe).fingerprint() == state
    with warnings.catch_warnings():  # what was fitted before is still there
        warnings.simplefilter("error", Notice)
        check_erased(pipe)
    pipe.tokenizer.add_tokens(["<style>", "<style>_1"])
    pipe.text_encoder.resize_token_embeddings(len(pipe.tokenizer))
    with pytest.warns(Notice, match="fitting anew what erases Picasso"):
        check_erased(pipe)
    assert pipe.maybe_convert_prompt("a <style>", pipe.tokenizer) == "a <style> <style>_1"
    assert torch.equal(
        encode(pipe, "a <style>")[0], type(pipe).encode_prompt(pipe, "a <style>", pipe.device, 1, False)[0]
    )
    assert eraser.erased == ["Picasso"]


@pytest.mark.slow
def test_a_lora_of_the_text_encoder_and_its_scale_count():
    pipe = load()
    eraser = erased_from(pipe)
    targets = ["q_proj", "v_proj"]
    torch.manual_seed(0)
    inject_adapter_in_model(LoraConfig(r=4, target_modules=targets, init_lora_weights=False), pipe.text_encoder)
    states = [PipelineEncoder(pipe, pipe.encode_prompt, scale).fingerprint() for scale in (None, 1.0, 0.3)]
    assert states[0] == states[1] != states[2]
    for settings in ({}, {"lora_scale": 0.3}):
        with pytest.warns(Notice, match="fitting anew what erases Picasso"):
            check_erased(pipe, **settings)
    with warnings.catch_warnings():
        warnings.simplefilter("error", Notice)
        for settings in ({"lora_scale": 0.3}, {"lora_scale": 1.0}, {}):
            check_erased(pipe, **settings)
    assert eraser.erased == ["Picasso"]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_rounded_pipeline_decides_the_same(dtype):
    pipe = load()
    erased_from(pipe)
    pipe.to(dtype=dtype)
    with pytest.warns(Notice, match="fitting anew"):
        check_erased(pipe)


def test_the_fingerprint_is_the_same_for_the_same_weights(plain):
    encoder = PipelineEncoder.of(plain)
    assert encoder.fingerprint() == PipelineEncoder.of(deepcopy(plain)).fingerprint()
    for dtype in (torch.float16, torch.bfloat16):
        other = deepcopy(plain)
        other.text_encoder.to(dtype)
        assert PipelineEncoder.of(other).fingerprint() != encoder.fingerprint()


def test_clip_skip_has_maps_of_its_own_and_negative_prompts_do_not(pipe, eraser):
    # which the installed transformers call otherwise than diffusers do
    object.__setattr__(
        pipe.text_encoder, "text_model", SimpleNamespace(final_layer_norm=pipe.text_encoder.final_layer_norm)
    )
    settings = {"negative_prompt": SAYING[:1], "do_classifier_free_guidance": True}
    full = encode(pipe, SAYING[:1], **settings)
    with pytest.warns(Notice, match="`clip_skip` 1 needs maps of its own: fitting anew what erases Picasso, VanGogh"):
        check_erased(pipe, clip_skip=1)
    skipped = encode(pipe, SAYING[:1], clip_skip=1, **settings)
    assert torch.equal(skipped[1], full[1]) and not torch.equal(skipped[0], full[0])
    own = type(pipe).encode_prompt(pipe, [SAYING[0], "a painting by an artist"], pipe.device, 1, False, clip_skip=1)[0]
    assert (skipped[0][0] - own[1]).norm() < (own[0] - own[1]).norm()
    eraser.restore(["Picasso", "VanGogh"])
    del pipe.text_encoder.__dict__["text_model"]


# Stable Diffusion XL


@pytest.fixture(scope="module")
def xl(tmp_path_factory):
    pipe = load(make_xl(tmp_path_factory.mktemp("models") / "xl"), XLPipeline)
    for encoder in (pipe.text_encoder, pipe.text_encoder_2):
        encoder.get_input_embeddings().weight.data.mul_(10)  # so that its random states tell tokens apart
    return pipe


def test_both_encoders_and_the_pooled_embedding_of_xl_are_edited(xl):
    plain = deepcopy(xl)
    eraser = erased_from(
        xl, config=GateConfig(retain_captions=40, retain_words=40, compositions=10, word_lists=10, misspellings=10)
    )
    settings = {"num_images_per_prompt": 2, "do_classifier_free_guidance": True}
    prompts, negative = ["a photo of a church", "art by Picasso", ""], ["Picasso", "", "a car"]
    before = encode(plain, prompts, negative_prompt=negative, **settings)
    after = encode(xl, prompts, negative_prompt=negative, **settings)
    kept = [[True] * 2 + [False] * 2 + [True] * 2, [False] * 2 + [True] * 4]
    for number, expected in enumerate(kept * 2):
        assert after[number].shape == before[number].shape
        assert same_rows(before[number], after[number]) == expected
    assert torch.equal(encode(xl, prompts, **settings)[1], torch.zeros_like(after[1]))  # as XL does without any
    second = encode(xl, "a church", prompt_2="art by Picasso"), encode(plain, "a church", prompt_2="art by Picasso")
    assert not torch.equal(second[0][0], second[1][0]) and not torch.equal(second[0][2], second[1][2])
    own = encode(xl, "art by Picasso")
    image(xl, None, prompt_embeds=own[0], pooled_prompt_embeds=own[2], guidance_scale=1.0)
    with pytest.raises(ValueError, match="`pooled_prompt_embeds` do not tell"):
        image(xl, None, prompt_embeds=own[0], pooled_prompt_embeds=second[1][2], guidance_scale=1.0)
    assert torch.equal(image(xl, "a car"), image(plain, "a car"))
    with pytest.warns(Notice, match="`clip_skip` 1 needs maps of its own"):
        skipped = encode(xl, prompts, clip_skip=1)
    unedited = encode(plain, prompts, clip_skip=1)
    for number in (0, 2):
        assert same_rows(unedited[number], skipped[number]) == [True, False, True]
    eraser.restore("Picasso")
    assert torch.equal(encode(xl, prompts)[0], encode(plain, prompts)[0])


# What is refused


@pytest.mark.parametrize(
    ("texts", "settings", "message"),
    [
        ("", {}, "`texts` has an empty text, or none at all: name a concept"),
        (["Picasso", " \u3000\n"], {}, "`texts` has an empty text"),
        ([], {}, "or none at all"),
        ("/x/30.csv", {}, "`texts` has the file '/x/30.csv', and files are not taken here: give the texts in it"),
        ("Warhol", {"protect": "kept.txt"}, "`protect` has the file 'kept.txt', and files are not taken here"),
        ([3], {}, "`texts` has 3, which is no text: give texts"),
        ("Warhol", {"kind": "planet"}, "'planet' is none of style, object"),
        ("Warhol", {"protect": [None]}, "`protect` has None, which is no text"),
        ("Warhol", {"aliases": {"Andy": ["Drella"]}}, "`aliases` are given for 'Andy', which is none of the texts"),
        ("Warhol", {"aliases": {"Warhol": []}}, "`aliases` has an empty text, or none at all"),
        ("Warhol", {"kind": {"Andy": "style"}}, "`kind` is given for 'Andy', which is none of the texts"),
        ("Warhol", {"anchor": {"Andy": "a car"}}, "`anchor` is given for 'Andy', which is none of the texts"),
        ("Warhol", {"anchor": " "}, "`anchor` has an empty text"),
        ("Warhol", {"anchor": "empty"}, "the `anchor` 'empty' of 'Warhol' is no text but a setting"),
        ("Warhol", {"anchor": "art by warhol"}, "the `anchor` 'art by warhol' of 'Warhol' says 'Warhol'"),
        ("Warhol", {"anchor": "a Picasso"}, "the `anchor` 'a Picasso' of 'Warhol' says 'Picasso', which is erased"),
        ("a church", {"protect": ["the church"]}, "the protected prompt 'the church' says 'a church'"),
        (
            "Warhol",
            {"aliases": {"Warhol": ["picasso"]}},
            "a spelling of 'Warhol', says 'Picasso' too: erase them as one",
        ),
        ("Picasso", {"aliases": {"Picasso": ["Pablito"]}}, "erased already: restore it before .* other `aliases`"),
        ("Paloma Picasso", {}, "'Paloma Picasso' says 'Picasso' too: .* one of them among the other's `aliases`"),
        (["Andy Warhol", "Warhol"], {}, "'Andy Warhol' says 'Warhol' too"),
        ("church", {"protect": ["a church"]}, "the protected prompt 'a church' says 'church'"),
        ("Warhol", {"protect": "art by picasso"}, "the protected prompt 'art by picasso' says 'Picasso'"),
        ("CCS 2024", {}, "the protected prompt 'CCS 2024' says 'CCS 2024'"),
    ],
)
def test_texts_that_cannot_be_erased_are_refused_in_a_line_and_nothing_changes(pipe, eraser, texts, settings, message):
    before = encode(pipe, SAYING)[0]
    with pytest.raises(ValueError, match=message) as caught:
        eraser.erase(texts, **settings)
    assert "\n" not in str(caught.value) and eraser.erased == ["Picasso", "VanGogh"]
    assert torch.equal(encode(pipe, SAYING)[0], before)


@pytest.mark.slow
def test_what_no_gate_tells_is_refused_and_the_pipeline_stays_as_it_was(plain, monkeypatch):
    monkeypatch.setattr(gate, "_TURN_RIDGES", ())  # since a direction that is turned may read the padding after a name
    pipe = load()
    eraser = ConceptEraser(pipe)
    eraser.config = SMALL
    with pytest.raises(ValueError, match=r"'the' is said by \d+ of 100 everyday captions"):
        eraser.erase(["Picasso", "the"], kind="style")
    with pytest.raises(ValueError, match="no gate tells 'Caravaggio' from other prompts") as caught:
        eraser.erase("Caravaggio", protect="art by Caravaggio2", kind="style")
    assert str(caught.value).endswith(": name it more narrowly, protect fewer prompts, or take the `form` linear")
    assert "gate`" not in str(caught.value) and "\n" not in str(caught.value)
    assert eraser.erased == [] and "encode_prompt" not in vars(pipe)
    assert eraser.erase("Picasso", kind="style")  # what was refused protects nothing
    check_erased(pipe)


def test_protected_prompts_keep_every_bit_or_are_refused(plain, pipe, eraser):
    eraser.erase("Picasso", protect=["a village by the sea"])
    assert torch.equal(encode(pipe, "a village by the sea")[0], encode(plain, "a village by the sea")[0])
    encoder = PipelineEncoder.of(plain)
    edits = eraser._fitted(encoder, encoder.fingerprint(), eraser._concepts, eraser._kept)
    by_text = {text: edits[concept] for text, concept in eraser._concepts.items()}
    message = f"the gate of 'Picasso' takes the protected prompt '{SAYING[0]}' for it: leave that out of `protect`"
    with pytest.raises(ValueError, match=message):  # one that no check of its text finds
        _check_protected(encoder, by_text, [*OTHERS, SAYING[0]])


@pytest.mark.parametrize("text", ["Cezanne", ["Picasso", "Cezanne"]])
def test_what_is_not_erased_is_not_restored(eraser, text):
    with pytest.raises(ValueError, match="'Cezanne' is not erased: erased are Picasso, VanGogh"):
        eraser.restore(text)
    assert eraser.erased == ["Picasso", "VanGogh"]


def test_all_and_none_of_what_is_erased_are_restored(pipe, eraser):
    eraser.restore([])
    assert eraser.erased == ["Picasso", "VanGogh"]
    with pytest.raises(ValueError, match="'all' is not erased"):
        eraser.restore(["all", "Picasso"])
    eraser.restore(" All ")
    assert eraser.erased == [] and PipelineEraser.of(pipe) is None
    eraser.restore(eraser.erased)
    eraser.restore("all")
    eraser.erase("Picasso")
    eraser._concepts["All"] = make_concept("All")
    eraser.restore("all")  # which is a concept here
    assert eraser.erased == ["Picasso"]


class OtherPipeline(DiffusionPipeline):
    """A pipeline whose prompts are encoded in another way."""

    def encode_prompt(self, prompt, prompt_2=None, device=None, max_sequence_length=512):
        raise NotImplementedError


def test_pipelines_of_other_kinds_are_refused_by_name(plain):
    with pytest.raises(ValueError, match="OtherPipeline does not encode prompts as Stable Diffusion") as caught:
        ConceptEraser(OtherPipeline())
    assert "\n" not in str(caught.value)
    blind = StableDiffusionPipeline(**{**plain.components, "text_encoder": None}, requires_safety_checker=False)
    with pytest.raises(ValueError, match="this StableDiffusionPipeline has no text encoder"):
        ConceptEraser(blind)
    with pytest.raises(ValueError, match="with a pipeline `ConceptEraser` takes nothing but a `form`"):
        ConceptEraser(plain, "style")  # pyright: ignore[reportCallIssue] - what is refused


def test_one_call_makes_erasers_of_models_and_of_pipelines(tiny, plain, pipe, eraser):
    assert ConceptEraser(pipe) is eraser  # a notebook's cell that runs twice
    assert type(ConceptEraser(plain)) is GatedPipelineEraser and ConceptEraser(plain) is not ConceptEraser(plain)
    model_eraser = ConceptEraser(tiny, category="style")
    assert type(model_eraser) is ConceptEraser and deepcopy(model_eraser).category == "style"
    copied = deepcopy(pipe)
    assert ConceptEraser(copied) is not eraser and ConceptEraser(copied).erased == eraser.erased
    ConceptEraser(copied).restore("Picasso")
    assert eraser.erased == ["Picasso", "VanGogh"]


@pytest.mark.slow
def test_any_text_is_erased_from_a_model_that_reads_real_language():
    folder = REPO_ROOT / "models" / "mini-sd-minilm"
    plain, pipe = load(folder), load(folder)
    eraser = erased_from(pipe, ["Vincent van Gogh", "Greg Rutkowski"])
    others = ["a white van on the street", "a landscape by Claude Monet", "", "a man riding a horse on the beach"]
    saying = ["a church by Vincent van Gogh", "a castle, in the style of greg rutkowski", "van Gogh"]
    kept = same_rows(encode(plain, others + saying)[0], encode(pipe, others + saying)[0])
    assert kept == [True] * len(others) + [False] * len(saying)
    assert torch.equal(image(pipe, others[0]), image(plain, others[0]))
    eraser.restore(["Vincent van Gogh"])
    assert eraser.erased == ["Greg Rutkowski"]
    assert torch.equal(image(pipe, saying[0]), image(plain, saying[0]))
