"""TODO metrics.lpips."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
import lpips
import math
import numpy as np
from pathlib import Path
import torch
from torchmetrics.functional.image import peak_signal_noise_ratio
import warnings
from ldm.io.images import load_batch
from ldm.io.paths import REPO_ROOT
from ldm.io.tensors import load_tensors


MIN_IMAGE_SIZE = 32  # pixels on a side that AlexNet's convolutions need


ALEXNET_FILE_TYPE = "AlexNet convolutions"


ALEXNET_WEIGHTS = REPO_ROOT / "models" / "lpips" / "alexnet.safetensors"


@cache
def lpips_network(device: torch.device) -> lpips.LPIPS:
    """LPIPS 0.1 on AlexNet with torchvision's weights from `models/lpips`, so that nothing is downloaded."""
    tensors, _ = load_tensors(ALEXNET_WEIGHTS, ALEXNET_FILE_TYPE, "make it with python train-scripts/convert-lpips.py")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchvision's notice that no pretrained weights are asked for
        net = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False)
    places = {"0": "slice1.0", "3": "slice2.3", "6": "slice3.6", "8": "slice4.8", "10": "slice5.10"}
    net.net.load_state_dict({name.replace(f"features.{number}.", f"{place}."): tensor for number, place in places.items()
                             for name, tensor in tensors.items() if name.startswith(f"features.{number}.")})
    return net.eval().requires_grad_(False).to(device)


def mean_psnr(values) -> float:
    """The PSNR of the mean squared error of pictures with these PSNRs in dB, so that one equal pair does not make it
    infinite; NaN for none."""
    values = np.asarray(values, dtype=float)
    values = values[~np.isnan(values)]
    if not len(values):
        return float("nan")
    error = (10 ** (-values / 10)).mean()
    return -10 * math.log10(error) if error else math.inf


def alexnet_features(images: torch.Tensor) -> list[torch.Tensor]:
    """What AlexNet's five convolutions make of images (N, 3, H, W) in [-1, 1]: (N, C, h, w) each, after ReLU.

    Raises ValueError when the images are too small for it.
    """
    if min(images.shape[2:]) < MIN_IMAGE_SIZE:
        raise ValueError(f"images of {tuple(images.shape[2:])} pixels are too small for AlexNet, which needs {MIN_IMAGE_SIZE}")
    net = lpips_network(images.device)
    return list(net.net(net.scaling_layer(images)))


@torch.no_grad()
def pairwise_metrics(first: Sequence[Path], second: Sequence[Path], device: torch.device,
              size: int | None = None, batch: int = 32) -> dict[str, torch.Tensor]:
    """For each pair of image files: `lpips`, `pixel` (largest difference of any channel, of 255) and `psnr` in dB.

    Equal pictures have an infinite PSNR. Raises ValueError when pictures differ in size or are too small for AlexNet.
    """
    net, rows = lpips_network(device), []
    for start in range(0, len(first), batch):
        pair = [load_batch(paths[start:start + batch], size) for paths in (first, second)]
        if pair[0].shape != pair[1].shape or min(pair[0].shape[2:]) < MIN_IMAGE_SIZE:
            raise ValueError(f"{first[start]} and {second[start]} differ in size, or are under {MIN_IMAGE_SIZE} pixels: "
                             "lpips_eval.py --image_size scales both")
        a, b = (images.to(device) for images in pair)
        rows.append((net(a, b).view(-1).cpu(), ((a - b).abs().amax((1, 2, 3)) * 127.5).round().cpu(),
                     peak_signal_noise_ratio(a, b, data_range=2.0, reduction="none", dim=(1, 2, 3)).cpu()))
    values = (torch.cat(column) for column in zip(*rows))
    return dict(zip(("lpips", "pixel", "psnr"), values))
