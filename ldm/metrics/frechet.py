"""The Frechet distance between the features of two sets of pictures (Heusel et al., arXiv 1706.08500).

With Inception's weights it is FID; without them the features are those of LPIPS' AlexNet, and it is never called FID.
"""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance, NoTrainInceptionV3

from ldm.images import load_batch
from ldm.metrics.perceptual import layers


def column(inception: Path | None) -> str:
    """What a table calls the distance."""
    return "fid" if inception else "fd_alexnet"


def _inception(weights: Path, device: torch.device) -> nn.Module:
    try:
        torch.load(weights, weights_only=True)  # torch-fidelity would run whatever code a pickle holds
        return NoTrainInceptionV3("inception-v3-compat", ["2048"], str(weights)).to(device)
    except (OSError, RuntimeError, KeyError, AttributeError, TypeError, pickle.UnpicklingError) as error:
        raise ValueError(f"{weights} holds no weights of FID's Inception: pass pt_inception-2015-12-05-6726825d.pth of "
                         "torch-fidelity to --inception_path, or leave it out for AlexNet's features") from error


@torch.no_grad()
def features(paths: Sequence[Path], device: torch.device, inception: Path | None = None, batch: int = 64) -> torch.Tensor:
    """One row per picture, float64 on the CPU: Inception's pooled 2048, else AlexNet's last convolution, pooled, 256.

    Raises ValueError when `inception` is no file of FID's Inception.
    """
    network, found = _inception(inception, device) if inception else None, []
    for start in range(0, len(paths), batch):
        images = load_batch(paths[start:start + batch]).to(device)
        if network:
            found.append(network(((images + 1) * 127.5).round().to(torch.uint8)))
        else:
            found.append(layers(images)[-1].mean((2, 3)))
    return torch.cat(found).double().cpu()


class _Given(nn.Module):
    """Features that are there already, in the place of torchmetrics' network."""

    def __init__(self, num_features: int):
        super().__init__()
        self.num_features = num_features

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        return given


def frechet(first: torch.Tensor, second: torch.Tensor) -> float:
    """`|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2))` of two sets of features (N, F) and (M, F); NaN for fewer than two."""
    if min(len(first), len(second)) < 2:
        return float("nan")
    metric = FrechetInceptionDistance(feature=_Given(first.shape[1])).set_dtype(torch.float64)
    metric.update(first, real=True)
    metric.update(second, real=False)
    return max(0.0, metric.compute().item())
