"""TODO metrics.style."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
import torch
from ldm.io.images import load_batch
from ldm.metrics.lpips import alexnet_features


def gram_matrix(features: torch.Tensor) -> torch.Tensor:
    """The correlations of the channels of (N, C, h, w): (N, C, C), divided by C h w."""
    flat = features.flatten(2)  # (N, C, h * w)
    return flat @ flat.transpose(1, 2) / flat[0].numel()


@torch.no_grad()
def style_distances(first: Sequence[Path], second: Sequence[Path], device: torch.device, batch: int = 32) -> torch.Tensor:
    """For each pair of image files the squared distance of the Gram matrices, summed over AlexNet's five layers, (N,)."""
    found = []
    for start in range(0, len(first), batch):
        sides = [alexnet_features(load_batch(paths[start:start + batch]).to(device)) for paths in (first, second)]
        found.append(sum((gram_matrix(a) - gram_matrix(b)).square().sum((1, 2)) for a, b in zip(*sides)).cpu())
    return torch.cat(found)
