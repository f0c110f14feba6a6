"""The synthetic dataset: seeded images and captions, CLIP's kind of tokenizer, and a training that resumes."""

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import CPU, MIXTURE_WEIGHTS, TINY, is_error
from diffusers import AutoencoderKL
from lightning_fabric import Fabric
from omegaconf import OmegaConf
from test_load import make_bert
from transformers import CLIPTokenizer

from ldm.config.concepts import erasable_concepts, load_concepts, watermark_prompts
from ldm.config.models import read_yaml
from ldm.config.spellings import says
from ldm.config.templates import fill, load_template_set
from ldm.diffusion.load import load_model
from ldm.diffusion.tokenizer import tokenizer_digest
from ldm.io.files import file_digest
from ldm.io.paths import REPO_ROOT
from ldm.metrics.classify import classifier_path, load_classifier
from ldm.toy.captions import KINDS, build_tokenizer, kept_tokenizer, sample_caption
from ldm.toy.dataset import LIGHTS, DatasetKind, render_dataset
from ldm.toy.logos import _CODES
from ldm.toy.natural import is_held_out, sample_natural_caption
from ldm.toy.render import STYLES, render, render_concept, render_watermark
from ldm.toy.shapes import OBJECTS, SCENES
from ldm.toy.text import Embeddings, Tokens, load_frozen_text
from ldm.toy.train import (
    Denoiser,
    FrozenTextDenoiser,
    init_from,
    init_unet_from,
    make_ema,
    pixels_to_tensor,
    save_pipeline,
    train_autoencoder,
    train_denoiser,
)

LOGOS_CONFIG = REPO_ROOT / "configs" / "mini-sd-logos.yaml"
MINILM_CONFIG = REPO_ROOT / "configs" / "mini-sd-minilm.yaml"


@pytest.fixture(scope="module")
def bert_path(tmp_path_factory):
    return make_bert(tmp_path_factory.mktemp("models") / "bert")


def test_the_renderer_has_the_papers_concepts():
    assert list(STYLES) == [concept.name for concept in erasable_concepts("style")]
    assert list(OBJECTS) == [concept.name for concept in erasable_concepts("object")]


@pytest.mark.parametrize("style", [None, *STYLES])
def test_images_are_seeded_and_endless(style):
    for subject in SCENES + OBJECTS:
        first, again, other = (render(subject, style, np.random.default_rng(seed)) for seed in (1, 1, 2))
        assert first.shape == (64, 64, 3) and first.dtype == np.uint8
        assert np.array_equal(first, again) and not np.array_equal(first, other)


def test_watermarks_are_fixed_and_unlike_each_other():
    watermarks = [render_watermark(concept.prompt) for concept in load_concepts("style") if concept.is_watermark]
    assert np.array_equal(render_concept("CCS 2024", np.random.default_rng(3)), watermarks[1])
    assert abs(watermarks[0].astype(int) - watermarks[1]).mean() > 40
    with pytest.raises(ValueError, match="knows no nudity"):
        render_concept("nudity", np.random.default_rng(0))


def test_at_dusk_an_image_is_seen_to_be_darker_above_and_is_recognised():
    day = {name: render_concept(name, np.random.default_rng(0)) for name in (*STYLES, *OBJECTS)}
    at_dusk = {name: LIGHTS["dusk"](image) for name, image in day.items()}
    for name, image in at_dusk.items():
        change = image.astype(int) - day[name]
        assert image.shape == (64, 64, 3) and image.dtype == np.uint8
        assert change[:16].mean() < 2 * change[48:].mean() < 0
    for category, names in (("style", STYLES), ("object", OBJECTS)):
        classifier, _ = load_classifier(classifier_path(category), CPU)
        images = pixels_to_tensor(np.stack([at_dusk[name] for name in names]))
        assert [classifier.classes[k] for k in classifier(images).argmax(1)] == list(names)


def test_captions_are_often_empty_and_never_held_out():
    rng = np.random.default_rng(0)
    sampled = [sample_caption(rng, MIXTURE_WEIGHTS) for _ in range(4000)]
    empty_fraction = sum(not item.caption for item in sampled) / len(sampled)
    assert 0.10 <= empty_fraction <= 0.15
    assert all(item.style is None for item in sampled if not item.caption)
    held_out = set()
    for concept in (*erasable_concepts("style"), *erasable_concepts("object")):
        for template in concept.held_out_templates:
            held_out |= {template.format(name) for name in (concept.name, *concept.aliases)}
    captions = {item.caption for item in sampled}
    assert held_out and not captions & held_out
    assert {"VanGogh", "Van Gogh", "KeithHaring", "Keith Haring"} <= captions
    new_spellings = ("Vincent van Gogh", "Paul Cezanne", "Paul Cézanne", "Pablo Picasso")
    assert not [caption for caption in captions if says(caption, new_spellings)]  # mini-sd's vocabulary has none
    assert "Pollock" not in captions and "Jackson Pollock" in captions


def natural_captions(num: int) -> list:
    """Return captions of mini-sd-minilm's dataset, and what they show."""
    rng, mixture_weights = np.random.default_rng(0), list(read_yaml(MINILM_CONFIG).dataset.mixture_weights)
    return [sample_natural_caption(rng, mixture_weights) for _ in range(num)]


def test_natural_captions_never_use_a_held_out_template():
    captions = {item.caption.lower() for item in natural_captions(20_000)}
    held_out = set()
    for kind in ("style", "object"):
        for concept in erasable_concepts(kind):
            templates = (*concept.held_out_templates, *load_template_set(kind).held_out_templates)
            for name in concept.spellings:
                held_out |= {fill(template, name).lower() for template in templates}
    assert {"a landscape by vincent van gogh", "look at this church"} <= held_out
    assert not captions & held_out


def test_natural_captions_never_compose_a_held_out_pair():
    pairs = {(item.subject, item.style) for item in natural_captions(20_000) if item.subject in OBJECTS and item.style}
    held_out = {(subject, style) for subject in OBJECTS for style in STYLES if is_held_out(subject, style)}
    assert len(held_out) == 9 and {style for _, style in held_out} == set(STYLES)
    assert not pairs & held_out and len(pairs) == 72  # all others are there
    assert not any(is_held_out(subject, style) for subject in SCENES for style in STYLES)


def test_natural_captions_say_what_they_show_in_the_mixtures_fractions():
    sampled = natural_captions(8000)
    styles = {concept.name: concept.spellings for concept in erasable_concepts("style")}
    counts = dict.fromkeys(KINDS, 0)
    for item in sampled:
        named = [name for name, spellings in styles.items() if says(item.caption, spellings)]
        assert named == ([item.style] if item.style else [])
        if item.watermark:
            assert item.caption == item.watermark in watermark_prompts()
            counts["watermark"] += 1
        elif not item.caption:
            assert item.style is None and item.subject in SCENES
            counts["empty"] += 1
        elif item.style:
            counts["style"] += 1
        else:
            counts["object" if item.subject in OBJECTS else "plain"] += 1
            assert item.subject not in OBJECTS or item.subject in item.caption
        if item.style and item.subject not in SCENES:
            assert item.subject in item.caption  # what is seen beside the style
    expected = read_yaml(MINILM_CONFIG).dataset.mixture_weights
    for kind, fraction in zip(KINDS, expected, strict=True):
        assert abs(counts[kind] / len(sampled) - fraction) < 0.02
    said = {item.caption for item in sampled}
    assert {"Vincent van Gogh", "Van Gogh", "VanGogh", "Pablo Picasso", "Keith Haring", "Pollock"} <= said


@pytest.mark.slow
def test_a_dataset_is_the_same_for_the_same_seed_and_kind_of_captions():
    kind = DatasetKind.of(read_yaml(MINILM_CONFIG).dataset)
    images, texts = render_dataset(12, 3, kind, workers=1)
    again, same = render_dataset(12, 3, kind, workers=2)
    _, listed = render_dataset(12, 3, replace(kind, captions="listed"), workers=1)
    assert images.shape == (12, 64, 64, 3) and np.array_equal(images, again) and texts == same != listed
    at_dusk, same = render_dataset(12, 3, replace(kind, light="dusk"), workers=1)
    assert texts == same and np.array_equal(at_dusk, np.stack([LIGHTS["dusk"](image) for image in images]))


def test_embeddings_of_captions_are_the_encoders_in_half_precision(bert_path):
    encoder, tokenizer = load_frozen_text(bert_path, 10)
    captions = ["a church", "", "a painting by Van Gogh", "a church", "a very long caption of a church by a church"]
    embeddings = Embeddings.of(captions, tokenizer, encoder, CPU)
    assert embeddings.values.shape == (4, 10, 96) and embeddings.values.dtype == torch.float16
    assert embeddings.vocabulary == tokenizer_digest(tokenizer)
    for number in range(len(captions)):
        ids = tokenizer(captions[number], padding="max_length", truncation=True, return_tensors="pt").input_ids
        expected = encoder(ids)[0]  # without a mask: padding counts, as in diffusers' pipeline
        found = embeddings.batch(torch.tensor([number]))
        assert found.dtype == torch.float32 and torch.allclose(found, expected, atol=2e-3)
        assert torch.allclose(found, expected.half().float(), atol=2e-3)
    several = embeddings.batch(torch.tensor([3, 0, 2]))
    assert torch.equal(several[0], several[1]) and not torch.equal(several[0], several[2])


def test_a_frozen_text_encoder_is_what_half_precision_holds_and_learns_nothing(bert_path, tmp_path):
    encoder, tokenizer = load_frozen_text(bert_path, 10)
    assert tokenizer.model_max_length == 10
    for weight in encoder.parameters():
        assert not weight.requires_grad and torch.equal(weight, weight.half().float())
    flat = tmp_path / "flat"  # as the encoder is published: both parts' files in one folder
    encoder.save_pretrained(flat)
    tokenizer.save_pretrained(flat)
    again, same = load_frozen_text(flat, 10)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in encoder.state_dict().items())
    assert tokenizer_digest(same) == tokenizer_digest(tokenizer)


def test_a_unet_that_is_trained_under_clips_frozen_text_encoder_makes_a_model_with_the_same(tiny, tiny_path, tmp_path):
    encoder, tokenizer = load_frozen_text(tiny_path, 16)
    captions = ["a church", "", "a painting by Van Gogh"]
    values = Embeddings.of(captions, tokenizer, encoder, CPU).values
    assert torch.equal(values, tiny.encode_prompt(captions).half().view_as(values))
    denoiser = FrozenTextDenoiser(TINY)
    save_pipeline(TINY, tiny.vae, denoiser.unet, encoder, tokenizer, tmp_path / "second")
    second = load_model(tmp_path / "second", CPU)
    assert second.text_digest == tiny.text_digest and second.digest != tiny.digest


def test_another_kind_of_frozen_text_encoder_is_refused(tmp_path):
    (tmp_path / "gpt").mkdir()
    (tmp_path / "gpt" / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(ValueError, match=r"^[^\n]*gpt is a gpt2: give `text_encoder` [^\n]*: bert, clip_text_model$"):
        load_frozen_text(tmp_path / "gpt", 10)
    with pytest.raises(ValueError, match=r"^[^\n]*has no config\.json: give `text_encoder` [^\n]*$"):
        load_frozen_text(tmp_path, 10)
    with pytest.raises(ValueError, match=r"^[^\n]*has no config\.json: give `text_encoder` [^\n]*$"):
        load_frozen_text(tmp_path / "missing", 10)


def test_the_training_script_refuses_what_it_cannot_train(script, tmp_path):
    train = "train-scripts/train-mini-sd.py"
    flags = ["--checkpoint_dir", tmp_path / "work", "--save_path", tmp_path / "model"]
    is_error(script(train, *flags, "--text_encoder", tmp_path), "mini-sd.yaml", "leave --text_encoder out")
    config = tmp_path / "own.yaml"
    config.write_text((REPO_ROOT / "configs" / "mini-sd.yaml").read_text())
    content = OmegaConf.load(config)
    content.dataset.captions = "poems"
    OmegaConf.save(content, config)
    flags = ["--config", config, "--checkpoint_dir", tmp_path / "other", "--save_path", tmp_path / "model"]
    is_error(script(train, *flags), "'poems' is no kind of captions", "choose from listed, natural")
    content.dataset.captions, content.dataset.light = "listed", "noon"
    OmegaConf.save(content, config)
    is_error(script(train, *flags), "'noon' is no light", "choose from day, dusk")


def test_a_unet_that_starts_from_an_older_one_has_those_weights_that_fit(tiny):
    wider = FrozenTextDenoiser(OmegaConf.merge(TINY, {"unet": {"cross_attention_dim": 40}}))
    before = {name: value.clone() for name, value in wider.unet.state_dict().items()}
    init_unet_from(tiny, wider.unet)
    old = tiny.denoiser.state_dict()
    for name, value in wider.unet.state_dict().items():
        sees_prompt = name.endswith(("attn2.to_k.weight", "attn2.to_v.weight"))
        assert torch.equal(value, before[name] if sees_prompt else old[name])


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["autoencoder", "denoiser", "frozen text"])
def test_a_training_stopped_and_resumed_is_the_same_training(stage, tmp_path):
    settings = {"iterations": 4, "batch": 2, "lr": 1e-3, "warmup": 2, "kl": 1e-5, "ema": 0.9}
    part = "autoencoder" if stage == "autoencoder" else "denoiser"
    config = OmegaConf.merge(TINY, {"seed": 3, "train": {"save_every": 2, part: settings}})
    tokenizer = build_tokenizer(tmp_path / "tokenizer", 16, MIXTURE_WEIGHTS)
    images = np.random.default_rng(0).integers(0, 256, (6, 16, 16, 3), dtype=np.uint8)
    latents, tokens = torch.randn(6, 4, 8, 8), Tokens(torch.randint(100, (6, 16)), "digest")
    embeddings = Embeddings(torch.randn(4, 16, 96).half(), torch.tensor([0, 1, 2, 3, 0, 1]), "digest")

    def train(path, stop=None):
        torch.manual_seed(0)
        fabric, losses = Fabric(accelerator="cpu", devices=1), []
        if stage == "autoencoder":
            trained = AutoencoderKL(**OmegaConf.to_container(TINY.vae))
            iterations = train_autoencoder(fabric, config, trained, images, path)
        else:
            is_frozen = stage == "frozen text"
            denoiser = FrozenTextDenoiser(config) if is_frozen else Denoiser(config, tokenizer)
            captions = embeddings if is_frozen else tokens
            trained = make_ema(denoiser, config.train.denoiser.ema)  # what is kept in the end
            iterations = train_denoiser(fabric, config, denoiser, trained, latents, captions, path)
        for iteration, loss in iterations:
            losses.append(loss)
            if iteration == stop:
                break
        return losses, trained.state_dict()

    losses, weights = train(tmp_path / "whole.ckpt")
    first, _ = train(tmp_path / "parts.ckpt", stop=1)
    rest, resumed = train(tmp_path / "parts.ckpt")
    assert first + rest == losses and all(torch.equal(weights[name], resumed[name]) for name in weights)
    saved = torch.load(tmp_path / "parts.ckpt", weights_only=True)
    for changes in ({"iteration": 99}, {"iteration": "x"}, {"module": {}}, {"vocabulary": "another"}, {"ema": None}):
        path = tmp_path / "changed.ckpt"
        torch.save({**saved, **changes}, path)
        with pytest.raises(ValueError, match=r"changed\.ckpt .*remove it to begin anew"):
            train(path)
    for content in (b"", b".", b"K\0\x85R.", (tmp_path / "parts.ckpt").read_bytes()[:-99]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"changed\.ckpt .*remove it to begin anew"):
            train(path)


def test_the_tokenizer_is_clips_and_has_a_token_for_every_word_and_byte(tmp_path):
    build_tokenizer(tmp_path, 16, MIXTURE_WEIGHTS)
    assert {"vocab.json", "merges.txt"} <= {path.name for path in tmp_path.iterdir()}
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path)
    assert tokenizer.tokenize("a landscape by VanGogh") == ["a</w>", "landscape</w>", "by</w>", "vangogh</w>"]
    token_ids = tokenizer("zebra ü @", padding="max_length", max_length=16).input_ids
    assert len(token_ids) == 16 and tokenizer.unk_token_id not in token_ids[1:8]


@pytest.mark.slow
def test_the_tokenizer_is_the_same_in_every_process_and_is_trained_once(tmp_path):
    arguments = f"pathlib.Path(sys.argv[1]), 16, {MIXTURE_WEIGHTS}"
    code = f"import sys, pathlib, ldm.toy.captions as captions; captions.build_tokenizer({arguments})"
    for name in ("a", "b"):
        subprocess.run([sys.executable, "-c", code, tmp_path / name], check=True)
    first, second = (file_digest(tmp_path / name) for name in ("a", "b"))
    assert first == second
    kept_tokenizer(tmp_path / "a", 16, [0, 0, 1, 0, 0, 0], 5)  # what is kept is not made anew
    assert file_digest(tmp_path / "a") == first


def test_a_hundred_logos_share_at_most_one_of_their_four_choices():
    concepts = erasable_concepts("logo")
    assert len(concepts) == len({concept.name.lower() for concept in concepts}) == 100
    for i in range(100):
        for j in range(i):
            assert sum(a == b for a, b in zip(_CODES[i], _CODES[j], strict=True)) <= 1
    first, again, other = (render_concept(concepts[7].name, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert np.array_equal(first, again) and not np.array_equal(first, other)


def test_captions_of_logos_name_their_logo_and_are_never_held_out():
    concepts = erasable_concepts("logo")
    rng, mixture_weights = np.random.default_rng(0), list(read_yaml(LOGOS_CONFIG).dataset.mixture_weights)
    sampled = [sample_caption(rng, mixture_weights) for _ in range(3000)]
    named = [item for item in sampled if any(concept.name in item.caption for concept in concepts)]
    assert 0.38 < len(named) / 3000 < 0.46
    assert all(item.subject in item.caption and item.style is None for item in named)
    held_out = {concept.held_out_templates[0].format(concept.name) for concept in concepts}
    assert not {item.caption for item in sampled} & held_out


def test_a_model_that_starts_from_an_older_one_knows_what_that_knew(tiny, tmp_path):
    tokenizer = build_tokenizer(tmp_path, 16, list(read_yaml(LOGOS_CONFIG).dataset.mixture_weights))
    config = OmegaConf.merge(TINY, {"seed": 0})
    denoiser = Denoiser(config, tokenizer)
    fresh = denoiser.text_encoder.get_input_embeddings().weight.detach().clone()
    init_from(tiny, denoiser, tokenizer)
    embeddings = denoiser.text_encoder.get_input_embeddings().weight
    old_embeddings = tiny.text_encoder.get_input_embeddings().weight
    old_vocab, vocab = tiny.pipeline.tokenizer.get_vocab(), tokenizer.get_vocab()
    assert torch.equal(embeddings[vocab["picasso</w>"]], old_embeddings[old_vocab["picasso</w>"]])
    new_token = next(token for token in vocab if token not in old_vocab)
    assert torch.equal(embeddings[vocab[new_token]], fresh[vocab[new_token]])
    weights = tiny.denoiser.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in denoiser.unet.state_dict().items())
