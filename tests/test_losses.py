import pytest
import torch

from ldm.attention import kv_layers
from ldm.losses import SeparableErasure
from ldm.shift import WeightShift, applied


def srs_me(tiny, reg_beta=1e-3):
    directions = torch.linalg.qr(torch.randn(96, 5, dtype=torch.float64)).Q.T
    layers = kv_layers(tiny.unet)
    shift = WeightShift.zeros(layers, directions, 0.5)
    loss = SeparableErasure(tiny, layers, shift, tiny.encode_prompt(["VanGogh"]), tiny.encode_prompt([""]), reg_beta)
    return layers, shift, loss


def test_the_loss_is_the_papers_formula(tiny):
    layers, shift, loss = srs_me(tiny)
    for weight in shift.parameters():
        torch.nn.init.normal_(weight.data, std=0.1)
    latents, step = torch.randn(2, *tiny.latent_shape), torch.tensor([100, 700])
    terms = loss(latents, step)
    concept, blank = (tiny.encode_prompt([prompt]).expand(2, -1, -1) for prompt in ("VanGogh", ""))
    frozen = tiny.predict_noise(latents, step, concept) - tiny.predict_noise(latents, step, blank)
    with applied(layers, [shift]):
        shifted = tiny.predict_noise(latents, step, concept)
    changed = shifted - tiny.predict_noise(latents, step, blank)
    correlation = (changed * frozen).mean()
    size = sum(shift.delta(name).abs().sum() for name in layers) / len(layers)
    assert terms.watched.item() == pytest.approx(correlation.item(), abs=1e-5)
    assert terms.total.item() == pytest.approx((correlation + 1e-3 * size).item(), rel=1e-4)


def test_only_the_shift_gets_gradients_and_a_zero_shift_starts_at_the_squared_representation(tiny):
    _, shift, loss = srs_me(tiny, reg_beta=0.0)
    terms = loss(torch.randn(2, *tiny.latent_shape), torch.tensor([100, 700]))
    terms.total.backward()
    assert terms.watched > 0
    assert all(weight.grad.abs().sum() > 0 for weight in shift.parameters())
    assert all(p.grad is None for p in tiny.unet.parameters())
