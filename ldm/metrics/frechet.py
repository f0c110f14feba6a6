"""TODO metrics.frechet."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
import pickle
import torch
from torch import nn
from torchmetrics.image.fid import NoTrainInceptionV3
from ldm.io.images import load_batch
from ldm.metrics.lpips import alexnet_features


def distance_column(inception: Path | None) -> str:
    """What a table calls the distance."""
    return "fid" if inception else "fd_alexnet"


@cache
def _inception(weights: Path, device: torch.device) -> nn.Module:
    try:
        torch.load(weights, weights_only=True, map_location=device)  # torch-fidelity would run whatever code a pickle holds
        return NoTrainInceptionV3("inception-v3-compat", ["2048"], str(weights)).to(device)
    except (OSError, EOFError, RuntimeError, KeyError, AttributeError, TypeError, pickle.UnpicklingError) as error:
        raise ValueError(f"{weights} holds no weights of FID's Inception: pass pt_inception-2015-12-05-6726825d.pth of "
                         "torch-fidelity to --inception_path, or leave it out for AlexNet's features") from error


@torch.no_grad()
def extract_features(paths: Sequence[Path], device: torch.device, inception: Path | None = None, batch: int = 64) -> torch.Tensor:
    """One row per picture, float64 on the CPU: Inception's pooled 2048, else AlexNet's last convolution, pooled, 256.

    Raises ValueError when `inception` is no file of FID's Inception.
    """
    network, found = _inception(inception, device) if inception else None, []
    for start in range(0, len(paths), batch):
        images = load_batch(paths[start:start + batch]).to(device)
        if network:
            found.append(network(((images + 1) * 127.5).round().to(torch.uint8)))
        else:
            found.append(alexnet_features(images)[-1].mean((2, 3)))
    return torch.cat(found).double().cpu()


def frechet_distance(first: torch.Tensor, second: torch.Tensor) -> float:
    """`|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2))` of two sets of features (N, F) and (M, F); NaN for fewer than two.

    With A and B the centred features over sqrt(N - 1) and sqrt(M - 1), C1 = A^T A and C2 = B^T B, so that the eigenvalues
    of C1 C2 are the squared singular values of A B^T (N, M): exact, and small where F is large.
    """
    if min(len(first), len(second)) < 2:
        return float("nan")
    a, b = ((side - side.mean(0)) / (len(side) - 1) ** 0.5 for side in (first, second))
    root = torch.linalg.svdvals(a @ b.T).sum()
    far = (first.mean(0) - second.mean(0)).square().sum() + a.square().sum() + b.square().sum() - 2 * root
    return max(0.0, far.item())
