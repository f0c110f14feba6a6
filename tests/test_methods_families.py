"""Methods that train a denoiser's own weights, on denoisers that are no U-Net: what works, and what is refused how."""

import pytest
import torch
from conftest import CPU, make_xl
from families import MAKERS, make_family

from ldm.config.concepts import get_concept
from ldm.config.methods import METHODS
from ldm.diffusion.edits import attention_score_differences
from ldm.diffusion.load import load_model
from ldm.diffusion.trainable import trainable_parameter_names
from ldm.erasure.methods import LOSSES

CONCEPT = get_concept("style", 1)
WITH_CROSS_ATTENTION = ("pixart-alpha", "pixart-sigma", "sana")


def load(name, folder):
    return load_model(make_xl(folder / name) if name == "xl" else make_family(name, folder / name), CPU)


def make_batch(model):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, *model.latent_shape, generator=generator), torch.tensor([300.0, 700.0]).round().long()


def predict(model, prompt, latents, timestep):
    return model.predict_noise(latents, timestep, model.encode_prompt([prompt]).expand(2, -1, -1))


def projections(layers, call) -> dict:
    """Return what the queries' and keys' layers of attention put out while `call` runs, by layer."""
    found: dict = {}
    parts = [part for layer in layers for part in (layer.to_q, layer.to_k)]
    hooks = [part.register_forward_hook(lambda module, _, output: found.update({module: output})) for part in parts]
    call()
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("name", [*WITH_CROSS_ATTENTION, "xl"])
def test_fmn_compares_the_scores_of_the_concept_and_its_anchor(name, tmp_path):
    model = load(name, tmp_path)
    loss = LOSSES["FMN"].from_config(model, CONCEPT, METHODS["FMN"]())
    latents, timestep = make_batch(model)
    layers = [module for name, module in model.denoiser.named_modules() if name.endswith("attn2")]
    own = projections(layers, lambda: predict(model, CONCEPT.captions[0], latents, timestep))
    anchors = projections(layers, lambda: predict(model, CONCEPT.anchor_prompt, latents, timestep))
    expected = 0
    for layer in layers:
        query, key, anchor = own[layer.to_q], own[layer.to_k], anchors[layer.to_k]
        q, k = (layer.head_to_batch_dim(each) for each in (query, key - anchor))
        expected += (layer.scale * q @ k.transpose(1, 2)).square().mean()
    output = loss(latents, timestep)
    assert output.loss.item() == pytest.approx(expected.item(), rel=1e-4) and output.loss > 1e-9
    optimiser = torch.optim.Adam(loss.parameters(), lr=1e-3)
    for _ in range(5):
        optimiser.zero_grad()
        loss(latents, timestep).loss.backward()
        optimiser.step()
    assert loss(latents, timestep).loss < 0.9 * output.loss
    assert len(loss.to_shift().parameter_names) and all("attn2" in name for name in loss.to_shift().parameter_names)


def test_fmn_follows_a_caption_projection_that_it_trains(tmp_path):
    model = load("sana", tmp_path)
    loss = LOSSES["FMN"].from_config(model, CONCEPT, METHODS["FMN"](train_method="full"))
    latents, timestep = make_batch(model)
    with torch.no_grad():
        loss.student["caption_projection.linear_1.weight"].mul_(3)
        found = loss(latents, timestep).loss
    with loss.edited_model(), torch.no_grad():
        inputs = model.denoiser.caption_norm(model.denoiser.caption_projection(loss.anchor_embeds))
        with attention_score_differences(model.denoiser, inputs) as differences:
            model.predict_noise(latents, timestep, loss.target_embeds.expand(2, -1, -1))
    assert found.item() == pytest.approx(sum(each.square().mean() for each in differences).item(), rel=1e-5)


@pytest.mark.parametrize("name", list(MAKERS))
@pytest.mark.parametrize("method", ["FMN", "AbConcept", "ESD", "SRS-ME-double-dagger"])
def test_each_method_trains_a_family_or_says_what_to_choose(name, method, tmp_path):
    model = load(name, tmp_path)
    config = METHODS[method]()
    kind = type(model.denoiser).__name__
    if method in ("FMN", "AbConcept") and name not in WITH_CROSS_ATTENTION:
        with pytest.raises(ValueError, match=f"{method} changes cross-attention, which {kind} does not have: choose"):
            LOSSES[method].from_config(model, CONCEPT, config)
        return
    if name == "lumina2":
        with pytest.raises(ValueError, match="nothing for `train_method` xattn: choose another, such as full"):
            LOSSES[method].check(model, config)
        config = config.with_changes(train_method="full")
    loss = LOSSES[method].from_config(model, CONCEPT, config)
    assert set(loss.student) == set(trainable_parameter_names(model.denoiser, config.train_method))
    loss(*make_batch(model)).loss.backward()
    assert any(parameter.grad is not None and parameter.grad.any() for parameter in loss.parameters())
