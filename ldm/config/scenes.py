"""The scenes of `configs/scenes.yaml`: the timeline of what is erased and restored when. No torch here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ldm.config.concepts import CATEGORIES, erasable_concepts
from ldm.config.yaml_files import check_keys, read_mapping
from ldm.io.paths import REPO_ROOT


@dataclass(frozen=True)
class SceneStep:
    """One time of a scene: what is erased just then, and what stands erased, and restored, from then on."""

    time: int
    newly_erased: tuple[int, ...]
    erased: tuple[int, ...]
    restored: tuple[int, ...]


def load_scene(number: int, category: str | None = None) -> list[SceneStep]:
    """Return one scene, time by time, whose indexes are those of `category`, if it is given.

    Raises ValueError for an unknown number, for a time that erases what is erased or restores what is not, and for an
    index that is no whole number, or of no concept of the category (without one: of any).
    """
    sizes = [len(erasable_concepts(name)) for name in ([category] if category else CATEGORIES)]
    path = REPO_ROOT / "configs" / "scenes.yaml"
    scenes = check_keys(read_mapping(path), ("scenes",), str(path)).get("scenes")
    if not isinstance(scenes, dict) or not all(type(known) is int for known in scenes):
        raise ValueError(f"{path}, scenes: it should be a mapping from whole numbers to lists of times")
    if number not in scenes:
        raise ValueError(f"no scene {number} in configs/scenes.yaml: choose from {', '.join(map(str, scenes))}")
    place = f"{path}, scene {number}"
    if not isinstance(scenes[number], list) or not scenes[number]:
        raise ValueError(f"{place} is {scenes[number]!r}, not a list of one time or more")
    erased: set[int] = set()
    restored: set[int] = set()
    steps = []
    for time, change in enumerate(scenes[number]):
        check_keys(change, ("erase", "restore"), f"{place}, time {time}")
        newly_erased = _check_indexes(change.get("erase", []), f"{place}, time {time}, erase", max(sizes))
        newly_restored = _check_indexes(change.get("restore", []), f"{place}, time {time}, restore", max(sizes))
        if newly_erased & erased or not newly_restored <= erased:
            raise ValueError(
                f"{place}, time {time}: it erases what is erased already, or restores what is not erased: correct the "
                "file"
            )
        erased = erased - newly_restored | newly_erased
        restored = restored - newly_erased | newly_restored
        steps.append(SceneStep(time, tuple(sorted(newly_erased)), tuple(sorted(erased)), tuple(sorted(restored))))
    return steps


def _check_indexes(value: Any, place: str, num_concepts: int) -> set[int]:
    """Return a list of indexes below `num_concepts` as a set. Raises ValueError for anything else."""
    if not isinstance(value, list):
        raise ValueError(f"{place} is {value!r}, not a list of indexes such as [0, 1]")
    for index in value:
        if type(index) is not int or not 0 <= index < num_concepts:
            raise ValueError(
                f"{place}: {index!r} is no concept's index: give whole numbers from 0 to {num_concepts - 1}"
            )
    return set(value)
