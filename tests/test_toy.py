"""The synthetic dataset: seeded images and captions, CLIP's kind of tokenizer, and a training that resumes."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import MIXTURE_WEIGHTS, TINY
from diffusers import AutoencoderKL
from lightning_fabric import Fabric
from omegaconf import OmegaConf
from transformers import CLIPTokenizer

from ldm.config.concepts import erasable_concepts, load_concepts
from ldm.config.models import read_yaml
from ldm.io.files import file_digest
from ldm.io.paths import REPO_ROOT
from ldm.toy.captions import build_tokenizer, kept_tokenizer, sample_caption
from ldm.toy.logos import _CODES
from ldm.toy.render import STYLES, render, render_concept, render_watermark
from ldm.toy.shapes import OBJECTS, SCENES
from ldm.toy.train import Denoiser, Tokens, init_from, make_ema, train_autoencoder, train_denoiser

LOGOS_CONFIG = REPO_ROOT / "configs" / "mini-sd-logos.yaml"


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


@pytest.mark.parametrize("stage", ["autoencoder", "denoiser"])
def test_a_training_stopped_and_resumed_is_the_same_training(stage, tmp_path):
    settings = {"iterations": 4, "batch": 2, "lr": 1e-3, "warmup": 2, "kl": 1e-5, "ema": 0.9}
    config = OmegaConf.merge(TINY, {"seed": 3, "train": {"save_every": 2, stage: settings}})
    tokenizer = build_tokenizer(tmp_path / "tokenizer", 16, MIXTURE_WEIGHTS)
    images = np.random.default_rng(0).integers(0, 256, (6, 16, 16, 3), dtype=np.uint8)
    latents, tokens = torch.randn(6, 4, 8, 8), Tokens(torch.randint(100, (6, 16)), "digest")

    def train(path, stop=None):
        torch.manual_seed(0)
        fabric, losses = Fabric(accelerator="cpu", devices=1), []
        if stage == "autoencoder":
            trained = AutoencoderKL(**OmegaConf.to_container(TINY.vae))
            iterations = train_autoencoder(fabric, config, trained, images, path)
        else:
            denoiser = Denoiser(config, tokenizer)
            trained = make_ema(denoiser, config)  # what is kept in the end
            iterations = train_denoiser(fabric, config, denoiser, trained, latents, tokens, path)
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
    weights = tiny.unet.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in denoiser.unet.state_dict().items())
