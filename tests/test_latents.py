import itertools

import pytest
import torch
from PIL import Image

from ldm.latents import from_folder, noisy


def test_batches_are_the_same_for_the_same_seed_and_hold_the_images(tiny, tmp_path):
    Image.new("RGB", (16, 16), "red").save(tmp_path / "0_0.png")
    first, again = (list(itertools.islice(from_folder(tiny, tmp_path, 3, 5), 2)) for _ in range(2))
    assert all(torch.equal(a, b) and torch.equal(s, t) for (a, s), (b, t) in zip(first, again))
    assert first[0][0].shape == (3, *tiny.latent_shape) and not torch.equal(first[0][0], first[1][0])


def test_at_the_first_step_a_latent_is_almost_clean(tiny):
    clean = torch.ones(1, *tiny.latent_shape)
    for latents, step in itertools.islice(noisy(tiny, clean, 64, 0), 20):
        early = latents[step < 5]
        assert early.numel() == 0 or (early - 1).abs().mean() < 0.2


def test_a_missing_folder_says_what_makes_it(tiny, tmp_path):
    with pytest.raises(ValueError, match="run that"):
        from_folder(tiny, tmp_path / "none", 1, 0, "run that")
