"""A loaded model is diffusers' model, of noise or velocities, with one text encoder or two."""

import json
import shutil

import pytest
import torch
from conftest import CPU, make_xl
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from ldm.config.models import DEFAULT_CONFIG
from ldm.diffusion.load import load_model, resolve_config_dir, resolve_names, save_pipeline
from ldm.diffusion.sampling import SeededNoise, initial_noise, sample_latents


def test_it_is_the_diffusers_model(tiny, tiny_path):
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_path, safety_checker=None, dtype=torch.float32)
    embeds = tiny.encode_prompt(["VanGogh", ""])
    assert embeds.shape == (2, 16, 96)
    expected, _ = pipeline.encode_prompt("VanGogh", CPU, 1, False)
    assert torch.allclose(embeds[:1], expected, atol=1e-6)
    latents, timesteps = torch.randn(2, *tiny.latent_shape), torch.tensor([3, 500])
    expected = pipeline.unet(latents, timesteps, embeds).sample
    assert torch.allclose(tiny.predict_noise(latents, timesteps, embeds), expected, atol=1e-5)


def test_noise_levels_are_the_schedulers(tiny):
    latents, noise = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4)
    timesteps = torch.tensor([0, 400, 999])
    expected = DDPMScheduler.from_config(tiny.scheduler.config).add_noise(latents, noise, timesteps)
    assert torch.allclose(tiny.add_noise(latents, noise, timesteps), expected, atol=1e-6)


def test_images_go_through_the_autoencoder_at_the_models_size(tiny):
    images = torch.rand(2, 3, tiny.image_size, tiny.image_size) * 2 - 1
    latents = tiny.encode_image(images)
    assert latents.shape == (2, *tiny.latent_shape) and tiny.decode(latents).shape == images.shape


def test_nothing_is_trainable_and_the_digest_is_the_weights(tiny, tiny_path, other_path):
    for part in (tiny.denoiser, tiny.vae, tiny.text_encoder):
        assert not any(parameter.requires_grad for parameter in part.parameters())
    assert tiny.digest == load_model(tiny_path, CPU).digest != load_model(other_path, CPU).digest


def test_a_saved_model_is_the_same_model(tiny, tmp_path):
    save_pipeline(tiny, tmp_path / "copy")
    assert load_model(tmp_path / "copy", CPU).digest == tiny.digest


def test_a_merged_model_takes_the_settings_of_its_base(tmp_path):
    assert resolve_names("owner/name") == ("owner--name", "owner--name")
    assert resolve_names("a/sd-v1-4.ckpt", "configs/mini-sd.yaml") == ("sd-v1-4", "mini-sd")
    assert resolve_names(tmp_path) == (tmp_path.name, tmp_path.name)
    (tmp_path / "recipe.json").write_text('{"made_by": "Merge_model.py", "base": "mini-sd"}')  # of an older version
    assert resolve_names(tmp_path) == (tmp_path.name, "mini-sd")
    (tmp_path / "metadata.json").write_text('{"base_model": "mini-sd-logos"}')
    assert resolve_names(tmp_path) == (tmp_path.name, "mini-sd-logos")
    (tmp_path / "metadata.json").write_text("[]")
    with pytest.raises(ValueError, match="is not the metadata of a merged model"):
        resolve_names(tmp_path)


def test_what_is_no_model_is_refused(tmp_path, tiny_path):
    with pytest.raises(ValueError, match="`model`"):
        load_model(tmp_path / "none", CPU)
    with pytest.raises(ValueError, match="no checkpoint"):
        load_model(tmp_path / "model.ckpt", CPU)
    copy = copy_with_config(tiny_path, tmp_path / "sample", prediction_type="sample")
    with pytest.raises(ValueError, match="predicts 'sample'"):
        load_model(copy, CPU)


def copy_with_config(source, target, **changes):
    """Return a copy of a model folder with other values in its scheduler's config."""
    shutil.copytree(source, target)
    config = target / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | changes))
    return target


def sample_by_pipeline(model, noise):
    """Return the latents that diffusers' own pipeline samples for VanGogh."""
    model.pipeline.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 5, "guidance_scale": 3.0, "output_type": "latent"}
    return model.pipeline("VanGogh", latents=noise, **options).images


def test_a_model_of_velocities_predicts_noise_and_samples_as_its_pipeline(tiny_path, tmp_path):
    """v = sqrt(a) eps - sqrt(1 - a) z_0 with z_t = sqrt(a) z_0 + sqrt(1 - a) eps: of the two, eps."""
    model = load_model(copy_with_config(tiny_path, tmp_path / "velocity", prediction_type="v_prediction"), CPU)
    latents, timestep = torch.randn(1, *model.latent_shape), torch.tensor([400])
    embeds, alpha_bar = model.encode_prompt(["VanGogh"]), model.scheduler.alphas_cumprod[400]
    noise, velocity = model.predict_noise(latents, timestep, embeds), model.denoiser_output(latents, timestep, embeds)
    clean = (latents - (1 - alpha_bar).sqrt() * noise) / alpha_bar.sqrt()
    assert torch.allclose(alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * clean, velocity, atol=1e-5)
    first = initial_noise(model, 3, 1)
    sampled = sample_latents(model, SeededNoise(first, [torch.Generator()]), embeds, model.encode_uncond(), 5, 3.0)
    assert torch.allclose(sampled, sample_by_pipeline(model, first), atol=1e-4)


def test_xl_samples_as_its_pipeline_and_its_pooled_embedding_is_no_token(tmp_path):
    model = load_model(make_xl(tmp_path / "xl"), CPU)
    embeds, first = model.encode_prompt(["VanGogh"]), initial_noise(model, 3, 1)
    split = model.split(embeds)
    assert embeds.shape == (1, 17, 96 + 32) and split.tokens.shape == (1, 16, 96) and model.context_dim == 96 + 32
    assert split.pooled.abs().min() > 0 and not embeds[0, 16, :96].any() and not embeds[0, :16, 96:].any()
    assert not model.encode_uncond().any()  # XL's pipelines lead away from zeros
    sampled = sample_latents(model, SeededNoise(first, [torch.Generator()]), embeds, model.encode_uncond(), 5, 3.0)
    assert torch.allclose(sampled, sample_by_pipeline(model, first), atol=1e-4)


def test_parts_that_are_not_needed_leave_and_come_back(tiny):
    before = tiny.encode_prompt(["VanGogh"])
    tiny.offload()
    assert torch.equal(tiny.encode_prompt(["VanGogh"]), before)


def test_stable_diffusion_v1s_configs_and_tokenizer_are_here():
    folder = resolve_config_dir("sd-v1-4.ckpt", DEFAULT_CONFIG)
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    caption = "a photo of an astronaut riding a horse on mars"
    ids = tokenizer(caption, padding="max_length", truncation=True).input_ids
    assert ids[:12] == [49406, 320, 1125, 539, 550, 18376, 6765, 320, 4558, 525, 7496, 49407]
    assert ids[12:] == [49407] * 65
    with torch.device("meta"):
        parts = (
            CLIPTextModel(CLIPTextConfig.from_pretrained(folder / "text_encoder")),
            UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(folder / "unet")),
            AutoencoderKL.from_config(AutoencoderKL.load_config(folder / "vae")),
        )
    sizes = [sum(weight.numel() for weight in part.parameters()) for part in parts]
    assert sizes == [123060480, 859520964, 83653863]
