"""The synthetic dataset as arrays: rendered by processes that import neither diffusers nor transformers, and cached."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from ldm.io.files import atomic_write
from ldm.toy.captions import CaptionedScene, sample_caption
from ldm.toy.natural import sample_natural_caption

CAPTIONS: dict[str, Callable[[np.random.Generator, Sequence[float]], CaptionedScene]] = {
    "listed": sample_caption,
    "natural": sample_natural_caption,
}


def check_captions(kind: str) -> str:
    """Return a kind of captions. Raises ValueError for one that there is not."""
    if kind not in CAPTIONS:
        raise ValueError(f"dataset, captions: '{kind}' is no kind of captions: choose from {', '.join(CAPTIONS)}")
    return kind


def _render_caption(seed: tuple[int, int], mixture_weights: Sequence[float], captions: str) -> tuple[np.ndarray, str]:
    rng = np.random.default_rng(seed)
    captioned = CAPTIONS[captions](rng, mixture_weights)
    return captioned.render(rng), captioned.caption


def render_dataset(
    num_images: int, seed: int, mixture_weights: Sequence[float], captions: str = "listed", workers: int = 2
) -> tuple[np.ndarray, list[str]]:
    """Return `num_images` images of the synthetic dataset, (num_images, 64, 64, 3) uint8, and their captions.

    They are the same for the same seed, mixture weights (see `sample_caption`) and kind of `captions`.
    """
    seeds = [(seed, index) for index in range(num_images)]
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        render = partial(_render_caption, mixture_weights=list(mixture_weights), captions=captions)
        pairs = pool.map(render, seeds, chunksize=256)
    return np.stack([image for image, _ in pairs]), [caption for _, caption in pairs]


def cached_dataset(
    path: Path, num_images: int, seed: int, mixture_weights: Sequence[float], captions: str = "listed"
) -> tuple[np.ndarray, list[str]]:
    """Return what `render_dataset` does, rendered once and kept at `path` (npz)."""
    if not path.exists():
        images, texts = render_dataset(num_images, seed, mixture_weights, captions)
        with atomic_write(path) as partial_path:
            np.savez(partial_path, images=images, captions=np.array(json.dumps(texts)))
    with np.load(path) as cached:
        return cached["images"], json.loads(str(cached["captions"]))
