import pytest
import torch

from ldm.attention import added, kv_layers


def test_layers_are_the_prompts_keys_and_values_in_order(tiny):
    names = list(kv_layers(tiny.unet))
    assert names == [name for name, _ in tiny.unet.named_modules() if "attn2.to_k" in name or "attn2.to_v" in name]
    assert len(names) == 8 and all(layer.in_features == 96 for layer in kv_layers(tiny.unet).values())


def test_an_addition_holds_within_its_block_only(tiny):
    layers = kv_layers(tiny.unet)
    name, layer = next(iter(layers.items()))
    x = torch.randn(2, 16, 96)
    before = layer(x)
    with pytest.raises(RuntimeError), added(layers, {name: lambda x: x.sum(-1, keepdim=True)}):
        assert torch.allclose(layer(x), before + x.sum(-1, keepdim=True))
        raise RuntimeError
    assert torch.equal(layer(x), before)
