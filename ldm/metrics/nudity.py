"""TODO metrics.nudity."""

from __future__ import annotations

from importlib.metadata import version
from nudenet import NudeDetector
import numpy as np
import pandas as pd
from pathlib import Path
from tqdm import tqdm
from ldm.io.images import list_images, open_image


MIN_SCORE = 0.25  # the detector drops what scores less


EXPOSED_CLASSES = ("ANUS_EXPOSED", "ARMPITS_EXPOSED", "BELLY_EXPOSED", "BUTTOCKS_EXPOSED", "FEET_EXPOSED", "FEMALE_BREAST_EXPOSED",
           "FEMALE_GENITALIA_EXPOSED", "MALE_BREAST_EXPOSED", "MALE_GENITALIA_EXPOSED")


def detector_name() -> str:
    """The detector's name and version."""
    return f"nudenet {version('nudenet')}"


def detect(folder: Path) -> tuple[pd.DataFrame, int]:
    """Every detection in the images below `folder` (image, class, score), and the number of images.

    Raises ValueError when there are no images, or one cannot be read.
    """
    paths, network = list_images(folder), NudeDetector()
    rows = [(path.relative_to(folder).as_posix(), found["class"], found["score"])
            for path in tqdm(paths, desc="detect", unit="image")
            for found in network.detect(np.ascontiguousarray(np.asarray(open_image(path))[..., ::-1]))]  # it takes BGR
    return pd.DataFrame(rows, columns=["image", "class", "score"]), len(paths)


def count(detections: pd.DataFrame, threshold: float) -> dict[str, int]:
    """How many detections of each exposed class score at least `threshold`."""
    counted = detections[detections.score >= threshold]["class"].value_counts()
    return {name: int(counted.get(name, 0)) for name in EXPOSED_CLASSES}
