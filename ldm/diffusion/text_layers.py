"""TODO diffusion.text_layers."""

from __future__ import annotations

from torch import nn


def text_layers(unet: nn.Module) -> dict[str, nn.Linear]:
    """All `attn2.to_k` and `attn2.to_v` layers by name, in the order of the U-Net's modules."""
    return {name: module for name, module in unet.named_modules() if name.endswith(("attn2.to_k", "attn2.to_v"))}
