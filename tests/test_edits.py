"""Edits of a U-Net hold within their block, and train methods choose the layers that the paper names."""

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import nn

from ldm.config.methods import TRAIN_METHODS
from ldm.diffusion.edits import add_layer_outputs, clone_sharing_weights, remember_embeddings, replace_parameters
from ldm.diffusion.text_layers import text_layers
from ldm.diffusion.trainable import trainable_parameter_names


def test_text_layers_are_the_prompts_keys_and_values_in_order(tiny):
    names = list(text_layers(tiny.denoiser))
    assert names == [name for name, _ in tiny.denoiser.named_modules() if "attn2.to_k" in name or "attn2.to_v" in name]
    assert len(names) == 8 and all(layer.in_features == 96 for layer in text_layers(tiny.denoiser).values())


def test_an_addition_holds_within_its_block_only(tiny):
    layers = text_layers(tiny.denoiser)
    name, layer = next(iter(layers.items()))
    x = torch.randn(2, 16, 96)
    before = layer(x)
    with pytest.raises(RuntimeError), add_layer_outputs(layers, {name: lambda x: x.sum(-1, keepdim=True)}):
        assert torch.allclose(layer(x), before + x.sum(-1, keepdim=True))
        raise RuntimeError
    assert torch.equal(layer(x), before)


def test_replaced_parameters_hold_within_their_block_only_and_get_the_gradient(tiny):
    name = trainable_parameter_names(tiny.denoiser, "xattn")[0]
    base = tiny.denoiser.get_parameter(name)
    student = nn.Parameter(base.detach() + 1)
    latents, timestep, embeds = torch.randn(1, *tiny.latent_shape), torch.tensor(5), tiny.encode_prompt(["VanGogh"])
    with pytest.raises(RuntimeError), replace_parameters(tiny.denoiser, {name: student}):
        assert tiny.denoiser.get_parameter(name) is student
        tiny.predict_noise(latents, timestep, embeds).sum().backward()
        raise RuntimeError
    assert tiny.denoiser.get_parameter(name) is base and base.grad is None and student.grad.any()


def test_a_clone_has_other_weights_and_shares_the_rest(tiny):
    name = trainable_parameter_names(tiny.denoiser, "xattn")[0]
    base = tiny.denoiser.get_parameter(name)
    clone = clone_sharing_weights(tiny.denoiser, {name: base + 1})
    assert torch.equal(clone.get_parameter(name), base + 1) and tiny.denoiser.get_parameter(name) is base
    others = [other for other, _ in tiny.denoiser.named_parameters() if other != name]
    assert all(clone.get_parameter(other) is tiny.denoiser.get_parameter(other) for other in others)


def test_train_methods_choose_stable_diffusions_layers():
    """Stable Diffusion v1's own layout, at a small width.

    xlayer and selflayer are the original's blocks 6, 8 and 4, 7.
    """
    unet = UNet2DConditionModel(
        block_out_channels=(8, 8, 8, 8), norm_num_groups=4, cross_attention_dim=8, attention_head_dim=2
    )
    chosen = {method: trainable_parameter_names(unet, method) for method in TRAIN_METHODS}
    everything = {name for name, _ in unet.named_parameters()}
    assert set(chosen["full"]) == everything and len(chosen["xattn"]) == 16 * 5
    assert all("attn1" in name for name in chosen["selfattn"]) and len(chosen["selfattn"]) == 16 * 5
    left_out = {name.split(".")[0] for name in everything - set(chosen["notime"])}
    assert left_out == {"time_embedding", "conv_norm_out", "conv_out"}
    assert set(chosen["noxattn"]) == set(chosen["notime"]) - set(chosen["xattn"])

    def layers_of(method):
        return {name.split(".transformer")[0] for name in chosen[method]}

    assert layers_of("xlayer") == {"up_blocks.2.attentions.0", "up_blocks.2.attentions.2"}
    assert layers_of("selflayer") == {"down_blocks.1.attentions.0", "down_blocks.2.attentions.0"}
    assert all("attn2" in name for name in chosen["xlayer"]) and all("attn1" in name for name in chosen["selflayer"])


def test_a_u_net_without_such_layers_is_refused():
    with pytest.raises(ValueError, match="nothing for `train_method` xattn"):
        trainable_parameter_names(nn.Linear(2, 2), "xattn")


def test_embeddings_are_remembered_as_long_as_a_block_runs(tiny, monkeypatch):
    passes, embed = [], tiny.embed

    def counted(prompts):
        passes.extend(prompts)
        return embed(prompts)

    monkeypatch.setattr(tiny, "embed", counted)
    before = tiny.embed_prompts(["a dog"])["a dog"]
    with remember_embeddings(tiny):
        once = tiny.embed_prompts(["a dog", "a cat", "a dog"])
        with remember_embeddings(tiny):
            again = tiny.embed_prompts(["a cat", "a dog"])
    assert passes == ["a dog", "a dog", "a cat"] and list(again) == ["a cat", "a dog"]
    assert all(torch.equal(rows, before) for rows in (once["a dog"], again["a dog"]))
    tiny.embed_prompts(["a cat"])
    assert passes[3:] == ["a cat"]
