import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from lightning_fabric import Fabric
from omegaconf import OmegaConf
from transformers import CLIPTokenizer

from ldm.config.concepts import erasable_concepts, load_concepts
from ldm.toy.captions import build_tokenizer, sample_caption
from ldm.mini.logos import _CODES
from ldm.mini.paint import paint_concept
from ldm.toy.render import STYLES, render, render_watermark
from ldm.toy.shapes import OBJECTS, SCENES
from ldm.toy.train import Denoiser, init_from, make_ema, train_autoencoder, train_denoiser
from ldm.config.models import load_model_config

from conftest import SHARES, TINY


def test_the_world_has_the_papers_concepts():
    assert list(STYLES) == [concept.name for concept in erasable_concepts("style")]
    assert list(OBJECTS) == [concept.name for concept in erasable_concepts("object")]


@pytest.mark.parametrize("style", [None, *STYLES])
def test_pictures_are_seeded_and_endless(style):
    for subject in SCENES + OBJECTS:
        first, again, other = (render(subject, style, np.random.default_rng(seed)) for seed in (1, 1, 2))
        assert first.shape == (64, 64, 3) and first.dtype == np.uint8
        assert np.array_equal(first, again) and not np.array_equal(first, other)


def test_watermarks_are_fixed_and_unlike_each_other():
    marks = [render_watermark(concept.prompt) for concept in load_concepts("style") if concept.watermark]
    assert np.array_equal(paint_concept("CCS 2024", np.random.default_rng(3)), marks[1])
    assert abs(marks[0].astype(int) - marks[1]).mean() > 40
    with pytest.raises(ValueError, match="knows no nudity"):
        paint_concept("nudity", np.random.default_rng(0))


def test_captions_are_often_blank_and_never_held_out():
    rng = np.random.default_rng(0)
    drawn = [sample_caption(rng, SHARES) for _ in range(4000)]
    blank = sum(not item.caption for item in drawn) / len(drawn)
    assert 0.10 <= blank <= 0.15
    assert all(item.style is None for item in drawn if not item.caption)
    held_out = {template.format(name) for concept in (*erasable_concepts("style"), *erasable_concepts("object"))
                for template in concept.held_out for name in (concept.name, *concept.aliases)}
    captions = {item.caption for item in drawn}
    assert not captions & held_out
    assert {"VanGogh", "Van Gogh", "KeithHaring", "Keith Haring"} <= captions


@pytest.mark.parametrize("stage", ["autoencoder", "denoiser"])
def test_a_training_stopped_and_started_again_is_the_same_training(stage, tmp_path):
    given = {"steps": 4, "batch": 2, "lr": 1e-3, "warmup": 2, "kl": 1e-5, "ema": 0.9}
    config = OmegaConf.merge(TINY, {"seed": 3, "train": {"save_every": 2, stage: given}})
    tokenizer = build_tokenizer(tmp_path / "tokenizer", 16, SHARES)
    pictures = np.random.default_rng(0).integers(0, 256, (6, 16, 16, 3), dtype=np.uint8)
    latents, tokens = torch.randn(6, 4, 8, 8), torch.randint(100, (6, 16))

    def run(path, stop=None):
        torch.manual_seed(0)
        fabric, losses = Fabric(accelerator="cpu", devices=1), []
        if stage == "autoencoder":
            trained = AutoencoderKL(**OmegaConf.to_container(TINY.vae))
            steps = train_autoencoder(fabric, config, trained, pictures, path)
        else:
            denoiser = Denoiser(config, tokenizer)
            trained = make_ema(denoiser, config)  # what is kept in the end
            steps = train_denoiser(fabric, config, denoiser, trained, latents, tokens, path)
        for step, loss in steps:
            losses.append(loss)
            if step == stop:
                break
        return losses, trained.state_dict()

    whole, weights = run(tmp_path / "whole.ckpt")
    first, _ = run(tmp_path / "parts.ckpt", stop=1)
    rest, resumed = run(tmp_path / "parts.ckpt")
    assert first + rest == whole and all(torch.equal(weights[name], resumed[name]) for name in weights)


def test_the_tokenizer_is_clips_and_has_a_token_for_every_word_and_byte(tmp_path):
    build_tokenizer(tmp_path, 16, SHARES)
    assert {"vocab.json", "merges.txt"} <= {path.name for path in tmp_path.iterdir()}
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path)
    assert tokenizer.tokenize("a landscape by VanGogh") == ["a</w>", "landscape</w>", "by</w>", "vangogh</w>"]
    tokens = tokenizer("zebra ü @", padding="max_length", max_length=16).input_ids
    assert len(tokens) == 16 and tokenizer.unk_token_id not in tokens[1:8]


def test_a_hundred_logos_share_at_most_one_of_their_four_choices():
    concepts = erasable_concepts("logo")
    assert len(concepts) == len({concept.name.lower() for concept in concepts}) == 100
    assert all(sum(a == b for a, b in zip(_CODES[i], _CODES[j])) <= 1 for i in range(100) for j in range(i))
    first, again, other = (paint_concept(concepts[7].name, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert np.array_equal(first, again) and not np.array_equal(first, other)
    rng, shares = np.random.default_rng(0), load_model_config("mini-many").world.shares
    drawn = [sample_caption(rng, shares) for _ in range(3000)]
    named = [item for item in drawn if any(concept.name in item.caption for concept in concepts)]
    assert 0.38 < len(named) / 3000 < 0.46 and all(item.subject in item.caption and item.style is None for item in named)
    assert not {item.caption for item in drawn} & {concept.held_out[0].format(concept.name) for concept in concepts}


def test_a_model_that_goes_on_knows_what_the_older_one_knew(tiny, tmp_path):
    tokenizer = build_tokenizer(tmp_path, 16, load_model_config("mini-many").world.shares)
    config = OmegaConf.merge(TINY, {"seed": 0})
    denoiser = Denoiser(config, tokenizer)
    fresh = denoiser.text_encoder.get_input_embeddings().weight.detach().clone()
    init_from(tiny, denoiser, tokenizer)
    now, old = denoiser.text_encoder.get_input_embeddings().weight, tiny.text_encoder.get_input_embeddings().weight
    known, vocabulary = tiny.pipeline.tokenizer.get_vocab(), tokenizer.get_vocab()
    assert torch.equal(now[vocabulary["picasso</w>"]], old[known["picasso</w>"]])
    new = next(token for token in vocabulary if token not in known)
    assert torch.equal(now[vocabulary[new]], fresh[vocabulary[new]])
    weights = tiny.unet.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in denoiser.unet.state_dict().items())
