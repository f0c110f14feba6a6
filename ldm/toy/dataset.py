"""The synthetic dataset as arrays: rendered by processes that import neither diffusers nor transformers, and cached."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self

import numpy as np

from ldm.io.files import atomic_write
from ldm.toy.captions import CaptionedScene, sample_caption
from ldm.toy.natural import sample_natural_caption
from ldm.toy.render import dusk

CAPTIONS: dict[str, Callable[[np.random.Generator, Sequence[float]], CaptionedScene]] = {
    "listed": sample_caption,
    "natural": sample_natural_caption,
}
LIGHTS: dict[str, Callable[[np.ndarray], np.ndarray]] = {"day": np.asarray, "dusk": dusk}


@dataclass(frozen=True)
class DatasetKind:
    """What a dataset shows and says: mixture weights (see `sample_caption`), a kind of captions, and a light.

    The light is what becomes of every rendered image (64, 64, 3) uint8. Raises ValueError for one that there is not.
    """

    mixture_weights: Sequence[float]
    captions: str = "listed"
    light: str = "day"

    def __post_init__(self) -> None:
        if self.captions not in CAPTIONS:
            known = ", ".join(CAPTIONS)
            raise ValueError(f"dataset, captions: '{self.captions}' is no kind of captions: choose from {known}")
        if self.light not in LIGHTS:
            raise ValueError(f"dataset, light: '{self.light}' is no light: choose from {', '.join(LIGHTS)}")

    @classmethod
    def of(cls, dataset: Mapping[str, Any]) -> Self:
        """Return the kind that the `dataset` of a config says."""
        return cls(tuple(dataset["mixture_weights"]), dataset.get("captions", "listed"), dataset.get("light", "day"))


def _render_caption(seed: tuple[int, int], kind: DatasetKind) -> tuple[np.ndarray, str]:
    rng = np.random.default_rng(seed)
    captioned = CAPTIONS[kind.captions](rng, kind.mixture_weights)
    return LIGHTS[kind.light](captioned.render(rng)), captioned.caption


def render_dataset(num_images: int, seed: int, kind: DatasetKind, workers: int = 2) -> tuple[np.ndarray, list[str]]:
    """Return `num_images` images of the synthetic dataset, (num_images, 64, 64, 3) uint8, and their captions.

    They are the same for the same seed and kind.
    """
    seeds = [(seed, index) for index in range(num_images)]
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        pairs = pool.map(partial(_render_caption, kind=kind), seeds, chunksize=256)
    return np.stack([image for image, _ in pairs]), [caption for _, caption in pairs]


def cached_dataset(path: Path, num_images: int, seed: int, kind: DatasetKind) -> tuple[np.ndarray, list[str]]:
    """Return what `render_dataset` does, rendered once and kept at `path` (npz)."""
    if not path.exists():
        images, texts = render_dataset(num_images, seed, kind)
        with atomic_write(path) as partial_path:
            np.savez(partial_path, images=images, captions=np.array(json.dumps(texts)))
    with np.load(path) as cached:
        return cached["images"], json.loads(str(cached["captions"]))
