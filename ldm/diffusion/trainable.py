"""TODO diffusion.trainable."""

from __future__ import annotations

import re
from torch import nn


TRAIN_METHODS = ("xattn", "noxattn", "selfattn", "full", "notime", "xlayer", "selflayer")


def trainable_parameter_names(unet: nn.Module, method: str) -> list[str]:
    """The parameters that one of ESD's train methods (Gandikota et al., arXiv 2303.07345) changes, by name.

    xattn and selfattn: all cross- or self-attention; noxattn: all but cross-attention, time embedding and output; notime:
    all but the last two; full: all; xlayer: cross-attention of the first and last layer of the last but one up block that
    has any; selflayer: self-attention of the first layer of the last two such down blocks (in Stable Diffusion v1 the
    original's output blocks 6 and 8, and its input blocks 4 and 7).
    Raises ValueError for another method, or where the U-Net has no such layer.
    """
    if method not in TRAIN_METHODS:
        raise ValueError(f"unknown train method '{method}': choose one of {', '.join(TRAIN_METHODS)}")
    names = [name for name, _ in unet.named_parameters()]
    ends = ("conv_norm_out.", "conv_out.", "time_embedding.")

    def layers(side: str) -> list[list[str]]:
        """The layers with attention of each block of that side that has any."""
        blocks: dict[str, dict[str, None]] = {}
        for found in (re.match(rf"({side}_blocks\.\d+)\.attentions\.\d+\.", name) for name in names):
            if found:
                blocks.setdefault(found[1], {})[found[0]] = None
        return [list(block) for block in blocks.values()]

    up, down = layers("up"), layers("down")

    def chosen(name: str) -> bool:
        match method:
            case "xattn":
                return "attn2" in name
            case "selfattn":
                return "attn1" in name
            case "noxattn":
                return "attn2" not in name and not name.startswith(ends)
            case "notime":
                return not name.startswith(ends)
            case "xlayer":
                return "attn2" in name and name.startswith(tuple(layer for block in up[-2:][:1]
                                                                 for layer in (block[0], block[-1])))
            case "selflayer":
                return "attn1" in name and name.startswith(tuple(block[0] for block in down[-2:]))
        return True

    found = [name for name in names if chosen(name)]
    if not found:
        raise ValueError(f"this U-Net has nothing for --train_method {method}: choose another, such as xattn")
    return found
