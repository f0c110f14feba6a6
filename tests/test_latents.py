import itertools
from contextlib import nullcontext

import pytest
import torch
from diffusers import EulerDiscreteScheduler
from PIL import Image

from ldm.diffusion.latents import latents_from_folder, noised_batches, sampled_batches
from ldm.diffusion.sampling import make_scheduler, sample_latents
from ldm.erasure.merge import applied
from ldm.erasure.shift import DenseShift


def test_batches_are_the_same_for_the_same_seed_and_hold_the_images(tiny, tmp_path):
    Image.new("RGB", (16, 16), "red").save(tmp_path / "0_0.png")
    first, again = (list(itertools.islice(latents_from_folder(tiny, tmp_path, 3, 5), 2)) for _ in range(2))
    assert all(torch.equal(a, b) and torch.equal(s, t) for (a, s), (b, t) in zip(first, again))
    assert first[0][0].shape == (3, *tiny.latent_shape) and not torch.equal(first[0][0], first[1][0])


def test_at_the_first_step_a_latent_is_almost_clean(tiny):
    clean = torch.ones(1, *tiny.latent_shape)
    for latents, step in itertools.islice(noised_batches(tiny, clean, 64, 0), 20):
        early = latents[step < 5]
        assert early.numel() == 0 or (early - 1).abs().mean() < 0.2


def test_a_missing_folder_says_what_makes_it(tiny, tmp_path):
    with pytest.raises(ValueError, match="run that"):
        latents_from_folder(tiny, tmp_path / "none", 1, 0, "run that")


def test_sampled_latents_are_drawn_within_the_scope_and_stand_at_their_step(tiny):
    embedding, blank = tiny.encode_prompt(["VanGogh"]), tiny.encode_prompt([""])
    shift = DenseShift({"conv_in.weight": torch.ones_like(tiny.unet.conv_in.weight)})

    def draw(scope):
        return list(itertools.islice(sampled_batches(tiny, embedding, 2, 4, 3.0, 7, scope), 6))

    plain, again, shifted = draw(nullcontext), draw(nullcontext), draw(lambda: applied(tiny.unet, [shift]))
    timesteps = make_scheduler(tiny, 4).timesteps.tolist()
    stops = [timesteps.index(int(step[0])) for _, step in plain]
    assert len(set(stops)) > 1 and all(step.shape == (2,) and len(set(step.tolist())) == 1 for _, step in plain)
    generator = torch.Generator().manual_seed(7)
    for k, stop in enumerate(stops):
        torch.randint(4, (), generator=generator)
        noise = torch.randn((2, *tiny.latent_shape), generator=generator)
        expected = sample_latents(tiny, noise, embedding.expand(2, -1, -1), blank, 4, 3.0, stop)
        assert torch.equal(plain[k][0], expected) and torch.equal(plain[k][0], again[k][0])
        assert torch.equal(plain[k][0], shifted[k][0]) == (stop == 0)


def test_sampled_latents_are_scaled_as_the_sampler_scales_them(tiny):
    tiny.scheduler = EulerDiscreteScheduler(num_train_timesteps=1000)
    embedding = tiny.encode_prompt(["VanGogh"])
    batches = itertools.islice(sampled_batches(tiny, embedding, 8, 4, 1.0, 0, nullcontext), 12)
    noise = [latents for latents, step in batches if step[0] == 999]  # stopped before the first step
    assert noise and all(0.9 < latents.std() < 1.1 for latents in noise)  # Euler's own start at a deviation above 14
