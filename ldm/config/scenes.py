"""The scenes of `configs/scenes.yaml`: the timeline of what is erased and restored when. No torch here."""

from __future__ import annotations

from dataclasses import dataclass

from omegaconf import OmegaConf

from ldm.io.paths import REPO_ROOT


@dataclass(frozen=True)
class SceneStep:
    """One time of a scene: what is erased just then, and what stands erased, and restored, from then on."""

    time: int
    newly_erased: tuple[int, ...]
    erased: tuple[int, ...]
    restored: tuple[int, ...]


def load_scene(number: int) -> list[SceneStep]:
    """Return one scene, time by time.

    Raises ValueError for an unknown number, and for a time that erases what is erased or restores what is not.
    """
    scenes = OmegaConf.load(REPO_ROOT / "configs" / "scenes.yaml").scenes
    if number not in scenes:
        raise ValueError(f"no scene {number} in configs/scenes.yaml: choose from {', '.join(map(str, scenes))}")
    erased: set[int] = set()
    restored: set[int] = set()
    steps = []
    for time, change in enumerate(scenes[number]):
        newly_erased, newly_restored = set(change.get("erase", ())), set(change.get("restore", ()))
        if newly_erased & erased or not newly_restored <= erased:
            raise ValueError(
                f"configs/scenes.yaml, scene {number}, time {time}: it erases what is erased already, or "
                "restores what is not "
                "erased: correct the file"
            )
        erased = erased - newly_restored | newly_erased
        restored = restored - newly_erased | newly_restored
        steps.append(SceneStep(time, tuple(sorted(newly_erased)), tuple(sorted(erased)), tuple(sorted(restored))))
    return steps
