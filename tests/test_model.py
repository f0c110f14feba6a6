import json
import shutil

import pytest
import torch
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from ldm.config.models import load_model_config
from ldm.diffusion.load import DEFAULT_CONFIG, load_model, resolve_config_dir, save_pipeline
from ldm.diffusion.sampling import initial_noise, sample_latents

from conftest import CPU, make_xl


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
    assert tiny.digest == load_model(tiny_path, CPU).digest != load_model(other_path, CPU).digest


def test_a_saved_model_is_the_same_model(tiny, tmp_path):
    save_pipeline(tiny, tmp_path / "copy")
    assert load_model(tmp_path / "copy", CPU).digest == tiny.digest


def test_what_is_no_model_is_refused(tmp_path, tiny_path):
    with pytest.raises(ValueError, match="--model"):
        load_model(tmp_path / "none", CPU)
    with pytest.raises(ValueError, match="no checkpoint"):
        load_model(tmp_path / "model.ckpt", CPU)
    copy = reconfigured(tiny_path, tmp_path / "sample", "scheduler", "scheduler_config.json", prediction_type="sample")
    with pytest.raises(ValueError, match="predicts 'sample'"):
        load_model(copy, CPU)


def reconfigured(source, target, part, file, **changes):
    """A copy of a model folder with other values in one of its configs."""
    shutil.copytree(source, target)
    config = target / part / file
    config.write_text(json.dumps(json.loads(config.read_text()) | changes))
    return target


def test_a_model_of_velocities_predicts_noise_and_draws_as_its_pipeline(tiny_path, tmp_path):
    """v = sqrt(a) eps - sqrt(1 - a) z_0 with z_t = sqrt(a) z_0 + sqrt(1 - a) eps: of the two, eps."""
    model = load_model(reconfigured(tiny_path, tmp_path / "velocity", "scheduler", "scheduler_config.json",
                              prediction_type="v_prediction"), CPU)
    latents, step, prompt = torch.randn(1, *model.latent_shape), torch.tensor([400]), model.encode_prompt(["VanGogh"])
    kept = model.scheduler.alphas_cumprod[400]
    noise, velocity = model.predict_noise(latents, step, prompt), model.predict(latents, step, prompt)
    clean = (latents - (1 - kept).sqrt() * noise) / kept.sqrt()
    assert torch.allclose(kept.sqrt() * noise - (1 - kept).sqrt() * clean, velocity, atol=1e-5)
    first = initial_noise(model, 3, 1)
    expected = model.pipeline("VanGogh", latents=first, num_inference_steps=5, guidance_scale=3.0, output_type="latent").images
    assert torch.allclose(sample_latents(model, first, prompt, model.encode_uncond(), 5, 3.0), expected, atol=1e-4)


def test_xl_draws_as_its_pipeline_and_its_pooled_embedding_is_no_token(tmp_path):
    model = load_model(make_xl(tmp_path / "xl"), CPU)
    prompt, first = model.encode_prompt(["VanGogh"]), initial_noise(model, 3, 1)
    assert prompt.shape == (1, 17, 96) and model.tokens(prompt).shape == (1, 16, 96) and model.width == 96
    assert prompt[0, 16, :32].abs().min() > 0 and not prompt[0, 16, 32:].any()
    assert not model.encode_uncond().any()  # XL's pipelines lead away from zeros
    model.pipeline.set_progress_bar_config(disable=True)
    expected = model.pipeline("VanGogh", latents=first, num_inference_steps=5, guidance_scale=3.0, output_type="latent").images
    assert torch.allclose(sample_latents(model, first, prompt, model.encode_uncond(), 5, 3.0), expected, atol=1e-4)


def test_parts_that_are_not_needed_leave_and_come_back(tiny):
    before = tiny.encode_prompt(["VanGogh"])
    tiny.offload()
    assert torch.equal(tiny.encode_prompt(["VanGogh"]), before)


def test_stable_diffusion_v1s_configs_and_tokenizer_are_here():
    folder = resolve_config_dir("sd-v1-4.ckpt", DEFAULT_CONFIG)
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    ids = tokenizer("a photo of an astronaut riding a horse on mars", padding="max_length", truncation=True).input_ids
    assert ids[:12] == [49406, 320, 1125, 539, 550, 18376, 6765, 320, 4558, 525, 7496, 49407] and ids[12:] == [49407] * 65
    with torch.device("meta"):
        parts = (CLIPTextModel(CLIPTextConfig.from_pretrained(folder / "text_encoder")),
                 UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(folder / "unet")),
                 AutoencoderKL.from_config(AutoencoderKL.load_config(folder / "vae")))
    assert [sum(weight.numel() for weight in part.parameters()) for part in parts] == [123060480, 859520964, 83653863]


def test_settings_go_by_name_and_fall_back_to_stable_diffusion():
    assert load_model_config("mini-sd").unet.cross_attention_dim == 256
    assert load_model_config("anything").erasure["SRS-ME"].max_base == 691
