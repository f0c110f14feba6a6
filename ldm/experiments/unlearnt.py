"""A concept that the model never learnt, of which an attack finds what it teaches itself: the floor of a recovery."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
from PIL import Image

from ldm.config.concepts import OWN_INDEX, Concept, erasable_concepts, load_concepts
from ldm.config.everyday import kin_names
from ldm.experiments.probe import UNEDITED, Bench
from ldm.io.files import file_digest
from ldm.io.images import image_filename, list_images, open_image, save_image
from ldm.metrics.judge import FeatureJudge
from ldm.toy.render import render_woodcut

UNLEARNT = Concept(OWN_INDEX, "unlearnt", "unlearnt", kind="style")
_EACH = 40  # images to fit the judge, and as many on which its threshold is set
_LEAST = 4  # of each of these where they are a user's own
_OWN_IMAGES = 4  # of each prompt by the unedited model
_EACH_KIN = 4  # so many names of kin are one prompt


@dataclass(frozen=True)
class Unlearnt:
    """What attackers have of the concept, and the judge that sees it."""

    examples: list[Path]
    judge: FeatureJudge

    @classmethod
    def of(cls, bench: Bench, number: int, unlearnt_dir: Path | None = None) -> Self:
        """Return the concept for a model, once for all probes: woodcuts, or what a user's own folder of images shows.

        A `number` of them is to attack with. By the others the judge tells them from what the unedited model makes.
        Raises ValueError for a folder of fewer than 8 others, and where the model's own images look like them.
        """
        key = cls, number, unlearnt_dir
        if key not in bench.shared:
            paths = _in_bench(bench, number, unlearnt_dir)
            place = bench.place(UNEDITED, UNLEARNT, "own images")
            own = bench.generate(UNEDITED, place, _own_prompts(bench.category), _OWN_IMAGES)
            others = paths[number:]
            parts = others[::2], others[1::2], own[::2], own[1::2]
            bench.shared[key] = cls(paths[:number], FeatureJudge.fit(*parts, bench.model.device))
        return bench.shared[key]


def _own_prompts(category: str) -> list[str]:
    """Return prompts for what a model makes: a category's, with names of `kin_names` where it has no concepts."""
    names = [] if erasable_concepts(category) else kin_names()[::_EACH_KIN]
    return list(dict.fromkeys([*names, *(concept.prompt for concept in load_concepts(category)), ""]))


def _in_bench(bench: Bench, attacking: int, unlearnt_dir: Path | None) -> list[Path]:
    """Return the images of the concept at the model's size, kept with all else that is made."""
    size = bench.model.image_size
    if unlearnt_dir is None:
        name, number = f"woodcuts {size}", attacking + 2 * _EACH
        examples = (
            Image.fromarray(render_woodcut(np.random.default_rng((bench.seed, k)), size)) for k in range(number)
        )
    else:
        found = list_images(unlearnt_dir, "images")[: attacking + 2 * _EACH]
        name, number = f"own {size} {file_digest(unlearnt_dir)[:8]}", len(found)
        least = attacking + 2 * _LEAST
        if number < least:
            raise ValueError(f"`unlearnt_dir` {unlearnt_dir} has {number} images: give {least} or more")
        examples = (open_image(path, size) for path in found)
    folder = bench.place(UNEDITED, UNLEARNT, name)
    paths = [folder / image_filename(k, 0) for k in range(number)]
    if not all(path.is_file() for path in paths):
        folder.mkdir(parents=True, exist_ok=True)
        for path, example in zip(paths, examples, strict=True):
            save_image(path, example)
    return paths
