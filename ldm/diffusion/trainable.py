"""Which parameters of a denoiser a method trains: ESD's seven choices."""

from __future__ import annotations

import re
from collections.abc import Callable

from torch import nn

from ldm.config.methods import TRAIN_METHODS

_TIME_AND_OUTPUT = ("time_embedding.", "conv_norm_out.", "conv_out.")


def trainable_parameter_names(unet: nn.Module, method: str) -> list[str]:
    """Return the names of the parameters that a train method of ESD (Gandikota et al., arXiv 2303.07345) changes.

    - xattn, selfattn: all of cross-attention, or of self-attention. Of a transformer in which those of prompt and image
      attend to each other, xattn are the projections of the prompt's.
    - noxattn: all but cross-attention, time embedding and output.
    - notime: all but time embedding and output.
    - full: all.
    - xlayer: cross-attention of the first and last layer of the last but one up block that has any attention.
    - selflayer: self-attention of the first layer of the last two down blocks that have any.

    In Stable Diffusion v1 the last two are the original's output blocks 6 and 8, and its input blocks 4 and 7.
    Raises ValueError for another method, or where the denoiser has no such layer.
    """
    if method not in TRAIN_METHODS:
        raise ValueError(f"unknown train method '{method}': choose one of {', '.join(TRAIN_METHODS)}")
    names = [name for name, _ in unet.named_parameters()]
    xlayers: list[str] = []
    for layers in _attention_layers(names, "up")[-2:][:1]:
        xlayers += [layers[0], layers[-1]]
    selflayers = [layers[0] for layers in _attention_layers(names, "down")[-2:]]
    rules: dict[str, Callable[[str], bool]] = {
        "xattn": _is_cross_attention,
        "selfattn": lambda name: "attn1" in name,
        "noxattn": lambda name: not _is_cross_attention(name) and not name.startswith(_TIME_AND_OUTPUT),
        "notime": lambda name: not name.startswith(_TIME_AND_OUTPUT),
        "full": lambda name: True,
        "xlayer": lambda name: _is_cross_attention(name) and name.startswith(tuple(xlayers)),
        "selflayer": lambda name: "attn1" in name and name.startswith(tuple(selflayers)),
    }
    selected = [name for name in names if rules[method](name)]
    if not selected:
        other = "full" if method == "xattn" else "xattn"
        raise ValueError(f"this denoiser has nothing for `train_method` {method}: choose another, such as {other}")
    return selected


def _is_cross_attention(name: str) -> bool:
    return "attn2" in name or bool(re.search(r"\.attn\.(add_|to_add_|norm_added_)", name))


def _attention_layers(names: list[str], side: str) -> list[list[str]]:
    """Return the prefixes of the layers with attention of each block of `side` (up or down) that has any, in order."""
    blocks: dict[str, list[str]] = {}
    for name in names:
        match = re.match(rf"({side}_blocks\.\d+)\.attentions\.\d+\.", name)
        if match:
            layers = blocks.setdefault(match[1], [])
            if match[0] not in layers:
                layers.append(match[0])
    return list(blocks.values())
