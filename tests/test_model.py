import json
import shutil

import pytest
import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline

from ldm.model import load, save, settings

from conftest import CPU


def test_it_is_the_diffusers_model(tiny, tiny_path):
    pipe = StableDiffusionPipeline.from_pretrained(tiny_path, safety_checker=None, dtype=torch.float32)
    embedding = tiny.encode_prompt(["VanGogh", ""])
    assert embedding.shape == (2, 16, 96)
    expected, _ = pipe.encode_prompt("VanGogh", CPU, 1, False)
    assert torch.allclose(embedding[:1], expected, atol=1e-6)
    latents = torch.randn(2, *tiny.latent_shape)
    assert torch.allclose(tiny.predict_noise(latents, torch.tensor([3, 500]), embedding),
                          pipe.unet(latents, torch.tensor([3, 500]), embedding).sample, atol=1e-5)


def test_noise_levels_are_the_schedulers(tiny):
    latents, noise = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4)
    step = torch.tensor([0, 400, 999])
    assert torch.allclose(tiny.add_noise(latents, noise, step), DDPMScheduler.from_config(tiny.scheduler.config).add_noise(latents, noise, step),
                          atol=1e-6)


def test_images_go_through_the_autoencoder_at_the_models_size(tiny):
    images = torch.rand(2, 3, tiny.image_size, tiny.image_size) * 2 - 1
    latents = tiny.encode_image(images)
    assert latents.shape == (2, *tiny.latent_shape) and tiny.decode(latents).shape == images.shape


def test_nothing_is_trainable_and_the_digest_is_the_weights(tiny, tiny_path, other_path):
    assert not any(p.requires_grad for part in (tiny.unet, tiny.vae, tiny.text_encoder) for p in part.parameters())
    assert tiny.digest == load(tiny_path, CPU).digest != load(other_path, CPU).digest


def test_a_saved_model_is_the_same_model(tiny, tmp_path):
    save(tiny, tmp_path / "copy")
    assert load(tmp_path / "copy", CPU).digest == tiny.digest


def test_what_is_no_model_is_refused(tmp_path, tiny_path):
    with pytest.raises(ValueError, match="--model"):
        load(tmp_path / "none", CPU)
    with pytest.raises(ValueError, match="single-file"):
        load(tmp_path / "model.ckpt", CPU)
    copy = tmp_path / "velocity"
    shutil.copytree(tiny_path, copy)
    config = copy / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"prediction_type": "v_prediction"}))
    with pytest.raises(ValueError, match="v_prediction"):
        load(copy, CPU)


def test_settings_go_by_name_and_fall_back_to_stable_diffusion():
    assert settings("mini-sd").unet.cross_attention_dim == 256
    assert settings("anything").erasure["SRS-ME"].max_base == 691
