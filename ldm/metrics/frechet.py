"""The Frechet distance of two sets of images: FID (Heusel et al., arXiv 1706.08500), or that of AlexNet's features."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from torch import nn

from ldm.io.images import load_batches
from ldm.io.pickles import UnreadablePickleError, load_torch_pickle
from ldm.metrics.lpips import alexnet_features


def distance_column(inception_weights: Path | None) -> str:
    """Return what tables call the distance: `fid` by Inception's features, else `fd_alexnet`."""
    return "fid" if inception_weights else "fd_alexnet"


@cache
def _inception(weights: Path, device: torch.device) -> nn.Module:
    from torchmetrics.image.fid import NoTrainInceptionV3

    try:
        load_torch_pickle(weights, device)  # torch-fidelity would run code that a pickle holds
        return NoTrainInceptionV3("inception-v3-compat", ["2048"], str(weights)).to(device)
    except ModuleNotFoundError as error:
        raise ValueError("torch-fidelity is not installed: install this package with its extra 'eval'") from error
    except (UnreadablePickleError, OSError, RuntimeError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(
            f"{weights} holds no weights of FID's Inception: pass pt_inception-2015-12-05-6726825d.pth of "
            "torch-fidelity as `inception_weights`, or leave that out for AlexNet's features"
        ) from error


@torch.no_grad()
def extract_features(
    paths: Sequence[Path], device: torch.device, inception_weights: Path | None = None, batch_size: int = 64
) -> torch.Tensor:
    """Return the features of image files, a row for each image, float64 on the CPU.

    These are Inception's pooled features (N, 2048) where its weights are given, else AlexNet's last convolution,
    averaged over the image, (N, 256).

    Raises ValueError when images differ in size, and when `inception_weights` is no file of FID's Inception.
    """
    network = _inception(inception_weights, device) if inception_weights else None
    features = []
    for batch in load_batches(paths, batch_size):
        images = batch.to(device)  # (n, 3, H, W) in [-1, 1]
        if network:
            features.append(network(((images + 1) * 127.5).round().to(torch.uint8)))
        else:
            features.append(alexnet_features(images)[-1].mean((2, 3)))
    return torch.cat(features).double().cpu()


def frechet_distance(first: torch.Tensor, second: torch.Tensor) -> float:
    """Return `|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2))` of features (N, F) and (M, F); NaN for fewer than two rows.

    With A and B the centred features over sqrt(N - 1) and sqrt(M - 1), C1 = A^T A and C2 = B^T B, so that the
    eigenvalues of C1 C2 are the squared singular values of A B^T (N, M): exact, and small where F is large.
    """
    if min(len(first), len(second)) < 2:
        return float("nan")
    a, b = ((side - side.mean(0)) / (len(side) - 1) ** 0.5 for side in (first, second))
    root = torch.linalg.svdvals(a @ b.T).sum()  # the trace of (C1 C2)^(1/2)
    distance = (first.mean(0) - second.mean(0)).square().sum() + a.square().sum() + b.square().sum() - 2 * root
    return max(0.0, distance.item())
