"""The style distance of pairs of images: the difference of their Gram matrices (Gatys et al., arXiv 1508.06576)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from ldm.io.images import check_same_size, load_batches
from ldm.metrics.lpips import alexnet_features


def gram_matrix(features: torch.Tensor) -> torch.Tensor:
    """Return the correlations (N, C, C) of the channels of features (N, C, h, w), divided by C h w."""
    flat = features.flatten(2)  # (N, C, h * w)
    return flat @ flat.transpose(1, 2) / flat[0].numel()


@torch.no_grad()
def style_distances(
    first: Sequence[Path], second: Sequence[Path], device: torch.device, batch_size: int = 32
) -> torch.Tensor:
    """Return the squared distance (N,) of each pair of image files' Gram matrices, summed over AlexNet's five layers.

    Raises ValueError when images differ in size or are too small for AlexNet.
    """
    distances = []
    check_same_size(first[0], second[0])
    for batches in zip(load_batches(first, batch_size), load_batches(second, batch_size), strict=True):
        layers = zip(*(alexnet_features(batch.to(device)) for batch in batches), strict=True)
        total = torch.zeros(len(batches[0]), device=device)
        for a, b in layers:
            total = total + (gram_matrix(a) - gram_matrix(b)).square().sum((1, 2))
        distances.append(total.cpu())
    return torch.cat(distances)
