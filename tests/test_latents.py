"""The latents that erasures train on: seeded, noised to their timestep, or sampled by the model being trained."""

import itertools
from contextlib import nullcontext

import pytest
import torch
from diffusers import EulerDiscreteScheduler
from PIL import Image

from ldm.config.methods import ESDConfig
from ldm.diffusion.latents import latents_from_folder, noised_batches, sampled_batches
from ldm.diffusion.sampling import SeededNoise, make_scheduler, sample_latents
from ldm.erasure.merge import applied
from ldm.erasure.shift import DenseShift
from ldm.io.errors import MissingFileError


def test_batches_are_the_same_for_the_same_seed_and_hold_the_images(tiny, tmp_path):
    Image.new("RGB", (16, 16), "red").save(tmp_path / "0_0.png")
    first, again = (list(itertools.islice(latents_from_folder(tiny, tmp_path, 3, 5), 2)) for _ in range(2))
    for (latents, timesteps), (same_latents, same_timesteps) in zip(first, again, strict=True):
        assert torch.equal(latents, same_latents) and torch.equal(timesteps, same_timesteps)
    assert first[0][0].shape == (3, *tiny.latent_shape) and not torch.equal(first[0][0], first[1][0])


def test_at_the_first_timesteps_a_latent_is_almost_clean(tiny):
    clean = torch.ones(1, *tiny.latent_shape)
    for latents, timesteps in itertools.islice(noised_batches(tiny, clean, 64, 0), 20):
        early = latents[timesteps < 5]
        assert early.numel() == 0 or (early - 1).abs().mean() < 0.2


def test_a_missing_folder_says_what_was_to_be_there(tiny, tmp_path):
    """The command line makes of kind and details the command that generates the images."""
    with pytest.raises(MissingFileError, match="no folder") as missing:
        latents_from_folder(tiny, tmp_path / "none", 1, 0, category="style", concept="VanGogh")
    assert missing.value.kind == "training images"
    assert missing.value.details == {"category": "style", "concept": "VanGogh"}


def test_sampled_latents_are_sampled_within_the_scope_and_stand_at_their_timestep(tiny):
    prompt_embeds, uncond_embeds = tiny.encode_prompt(["VanGogh"]), tiny.encode_prompt([""])
    shift = DenseShift({"conv_in.weight": torch.ones_like(tiny.denoiser.conv_in.weight)})
    config = ESDConfig(train_batch_size=2, num_inference_steps=4, start_guidance=3.0, seed=7)

    def sample(scope):
        return list(itertools.islice(sampled_batches(tiny, prompt_embeds, config, scope), 6))

    plain, again, shifted = sample(nullcontext), sample(nullcontext), sample(lambda: applied(tiny.denoiser, [shift]))
    scheduled = make_scheduler(tiny, 4).timesteps.tolist()
    stops = [scheduled.index(int(timesteps[0])) for _, timesteps in plain]
    assert len(set(stops)) > 1
    assert all(timesteps.shape == (2,) and len(set(timesteps.tolist())) == 1 for _, timesteps in plain)
    generator = torch.Generator().manual_seed(7)
    for k, stop in enumerate(stops):
        torch.randint(4, (), generator=generator)
        noise = torch.randn((2, *tiny.latent_shape), generator=generator)
        expected = sample_latents(
            tiny, SeededNoise(noise, [generator]), prompt_embeds.expand(2, -1, -1), uncond_embeds, 4, 3.0, stop
        )
        assert torch.equal(plain[k][0], expected) and torch.equal(plain[k][0], again[k][0])
        assert torch.equal(plain[k][0], shifted[k][0]) == (stop == 0)


def test_sampled_latents_are_scaled_as_the_sampler_scales_them(tiny):
    tiny.scheduler = EulerDiscreteScheduler(num_train_timesteps=1000)
    prompt_embeds = tiny.encode_prompt(["VanGogh"])
    config = ESDConfig(train_batch_size=8, num_inference_steps=4, start_guidance=1.0, seed=0)
    batches = itertools.islice(sampled_batches(tiny, prompt_embeds, config, nullcontext), 12)
    noise = [latents for latents, timesteps in batches if timesteps[0] == 999]  # stopped before the first timestep
    assert noise and all(0.9 < latents.std() < 1.1 for latents in noise)  # Euler's own start at a deviation above 14
