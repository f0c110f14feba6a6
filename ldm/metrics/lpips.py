"""LPIPS (Zhang et al., arXiv 1801.03924), max pixel difference and PSNR of pairs of images; AlexNet's features."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import ArrayLike

from ldm.io.errors import MissingFileError
from ldm.io.images import load_batches
from ldm.io.paths import REPO_ROOT
from ldm.io.tensors import load_tensors

if TYPE_CHECKING:
    from lpips import LPIPS

MIN_IMAGE_SIZE = 32  # pixels on a side that AlexNet's convolutions need
ALEXNET_FILE_TYPE = "AlexNet convolutions"
ALEXNET_WEIGHTS = REPO_ROOT / "models" / "lpips" / "alexnet.safetensors"
# LPIPS' names of AlexNet's convolutions, by torchvision's numbers.
_LPIPS_LAYERS = {
    "0": "slice1.0",
    "3": "slice2.3",
    "6": "slice3.6",
    "8": "slice4.8",
    "10": "slice5.10",
}


@cache
def lpips_network(device: torch.device) -> LPIPS:
    """Return LPIPS 0.1 on AlexNet, with torchvision's weights from `models/lpips`, so that nothing is downloaded.

    Raises MissingFileError when these are missing.
    """
    from lpips import LPIPS  # which imports torchvision

    if not ALEXNET_WEIGHTS.is_file():
        raise MissingFileError(f"no {ALEXNET_FILE_TYPE} {ALEXNET_WEIGHTS}", "lpips weights")
    tensors, _ = load_tensors(ALEXNET_WEIGHTS, ALEXNET_FILE_TYPE)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchvision's notice that no pretrained weights are asked for
        network = LPIPS(net="alex", pnet_rand=True, verbose=False)
    weights = {}
    for number, layer in _LPIPS_LAYERS.items():
        for name, tensor in tensors.with_prefix(f"features.{number}.").items():
            weights[f"{layer}.{name}"] = tensor
    network.net.load_state_dict(weights)
    return network.eval().requires_grad_(False).to(device)


def mean_psnr(values: ArrayLike) -> float:
    """Return the PSNR in dB of the mean squared error of images with these PSNRs in dB; NaN for none.

    Averaging the errors, not the PSNRs, keeps one equal pair from making the mean infinite. NaNs are left out.
    """
    values = np.asarray(values, dtype=float)
    values = values[~np.isnan(values)]
    if not len(values):
        return float("nan")
    error = (10 ** (-values / 10)).mean()
    return -10 * math.log10(error) if error else math.inf


def alexnet_features(images: torch.Tensor) -> list[torch.Tensor]:
    """Return the outputs (N, C, h, w) of AlexNet's five convolutions, after ReLU, for images (N, 3, H, W) in [-1, 1].

    Raises ValueError when the images are smaller than `MIN_IMAGE_SIZE`.
    """
    if min(images.shape[2:]) < MIN_IMAGE_SIZE:
        size = tuple(images.shape[2:])
        raise ValueError(f"images of {size} pixels are too small for AlexNet, which needs {MIN_IMAGE_SIZE}")
    network = lpips_network(images.device)
    return list(network.net(network.scaling_layer(images)))


@torch.no_grad()
def pairwise_metrics(
    first: Sequence[Path],
    second: Sequence[Path],
    device: torch.device,
    image_size: int | None = None,
    batch_size: int = 32,
) -> dict[str, torch.Tensor]:
    """Return metrics of each pair of image files, (N,) each on the CPU.

    These are `lpips`, `max_abs_diff` (the largest difference of any channel, of 255) and `psnr` in dB, infinite for
    equal images. `image_size` scales and crops the images first.

    Raises ValueError when images differ in size or are smaller than `MIN_IMAGE_SIZE`.
    """
    from torchmetrics.functional.image import peak_signal_noise_ratio

    network = lpips_network(device)
    lpips_values, max_differences, psnr_values = [], [], []
    for a, b in zip(*(load_batches(paths, batch_size, image_size) for paths in (first, second)), strict=True):
        if a.shape != b.shape:
            raise ValueError(f"{first[0]} and {second[0]} differ in size: generate both by the same model")
        if min(a.shape[2:]) < MIN_IMAGE_SIZE:
            size = " x ".join(map(str, a.shape[2:]))
            raise ValueError(f"{first[0]} has {size} pixels: LPIPS needs {MIN_IMAGE_SIZE} on a side")
        a, b = a.to(device), b.to(device)  # (n, 3, H, W)
        lpips_values.append(network(a, b).view(-1).cpu())
        max_differences.append(((a - b).abs().amax((1, 2, 3)) * 127.5).round().cpu())
        psnr = peak_signal_noise_ratio(a, b, data_range=2.0, reduction="none", dim=(1, 2, 3))
        psnr_values.append(psnr.cpu())
    return {
        "lpips": torch.cat(lpips_values),
        "max_abs_diff": torch.cat(max_differences),
        "psnr": torch.cat(psnr_values),
    }
