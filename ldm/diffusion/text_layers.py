"""The linear layers of a U-Net that see the prompt alone: what erasure changes."""

from __future__ import annotations

from torch import nn


def text_layers(unet: nn.Module) -> dict[str, nn.Linear]:
    """Return the linear layers that see the prompt and nothing else, by name, in the order of the U-Net's modules.

    In Stable Diffusion these are all `attn2.to_k` and `attn2.to_v`, the keys and values of cross-attention. Where peft
    has put a LoRA around a layer, it is the layer inside, under the name that it has without.
    """
    found: dict[str, nn.Linear] = {}
    for name, module in unet.named_modules():
        own = name.removesuffix(".base_layer")
        if isinstance(module, nn.Linear) and own.endswith(("attn2.to_k", "attn2.to_v")):
            found[own] = module
    return found
