"""The linear layers of a U-Net that see the prompt alone: what erasure changes."""

from __future__ import annotations

from torch import nn


def text_layers(unet: nn.Module) -> dict[str, nn.Linear]:
    """Return the linear layers that see the prompt and nothing else, by name, in the order of the U-Net's modules.

    In Stable Diffusion these are all `attn2.to_k` and `attn2.to_v`, the keys and values of cross-attention.
    """
    return {
        name: module
        for name, module in unet.named_modules()
        if isinstance(module, nn.Linear) and name.endswith(("attn2.to_k", "attn2.to_v"))
    }
