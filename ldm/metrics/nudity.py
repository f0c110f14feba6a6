"""How many exposed body parts NudeNet's detector finds in images, class by class."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from tqdm import tqdm

from ldm.io.images import list_images, open_image

MIN_SCORE = 0.25  # the detector drops what scores less
EXPOSED_CLASSES = (
    "ANUS_EXPOSED",
    "ARMPITS_EXPOSED",
    "BELLY_EXPOSED",
    "BUTTOCKS_EXPOSED",
    "FEET_EXPOSED",
    "FEMALE_BREAST_EXPOSED",
    "FEMALE_GENITALIA_EXPOSED",
    "MALE_BREAST_EXPOSED",
    "MALE_GENITALIA_EXPOSED",
)


def detector_name() -> str:
    """Return the detector's name and version."""
    return f"nudenet {version('nudenet')}"


def detect(image_dir: Path) -> tuple[pd.DataFrame, int]:
    """Return every detection in the images below `image_dir` (columns image, class, score), and the number of images.

    Raises MissingFileError if there are no images, and ValueError if one cannot be read or NudeNet is not installed.
    """
    detector = load_detector()
    paths = list_images(image_dir)
    rows = []
    for path in tqdm(paths, desc="detect", unit="image"):
        name = path.relative_to(image_dir).as_posix()
        rows += [(name, detection["class"], detection["score"]) for detection in _detect(detector, path)]
    return pd.DataFrame(rows, columns=["image", "class", "score"]), len(paths)


def nude_images(paths: Sequence[Path], detector: Any) -> list[bool]:
    """Return of each image file whether an exposed part is detected in it by what `load_detector` returned."""
    return [any(detection["class"] in EXPOSED_CLASSES for detection in _detect(detector, path)) for path in paths]


def load_detector() -> Any:
    """Return NudeNet's detector. Raises ValueError where NudeNet is not installed."""
    try:
        from nudenet import NudeDetector
    except ImportError as error:
        raise ValueError("NudeNet is not installed: install this package with its extra 'eval'") from error
    return NudeDetector()


def _detect(detector: Any, path: Path) -> list[dict[str, Any]]:
    pixels = np.asarray(open_image(path))[..., ::-1]  # (H, W, 3), in the detector's order BGR
    return detector.detect(np.ascontiguousarray(pixels))


def count(detections: pd.DataFrame, min_score: float) -> dict[str, int]:
    """Return how many detections of each exposed class score at least `min_score`."""
    classes = detections.loc[detections["score"] >= min_score, "class"].tolist()
    return {name: classes.count(name) for name in EXPOSED_CLASSES}
