"""TODO config.scenes."""

from __future__ import annotations

from dataclasses import dataclass
from omegaconf import OmegaConf
from ldm.io.paths import REPO_ROOT


@dataclass(frozen=True)
class SceneStep:
    """One time of a scene: what is erased just then, and what stands erased, and restored, from then on."""

    time: int
    new: tuple[int, ...]
    erased: tuple[int, ...]
    restored: tuple[int, ...]


def load_scene(number: int) -> list[SceneStep]:
    """One scene of `configs/scenes.yaml`, time by time.

    Raises ValueError when there is none of that number, and for a time that erases what is erased or restores what is not.
    """
    scenes = OmegaConf.load(REPO_ROOT / "configs" / "scenes.yaml").scenes
    if number not in scenes:
        raise ValueError(f"no scene {number} in configs/scenes.yaml: choose from {', '.join(map(str, scenes))}")
    erased, restored, moments = set(), set(), []
    for time, change in enumerate(scenes[number]):
        new, back = set(change.get("erase", ())), set(change.get("restore", ()))
        if new & erased or not back <= erased:
            raise ValueError(f"configs/scenes.yaml, scene {number}, time {time}: it erases what is erased already, or "
                             "restores what is not erased: correct the file")
        erased, restored = erased - back | new, restored - new | back
        moments.append(SceneStep(time, tuple(sorted(new)), tuple(sorted(erased)), tuple(sorted(restored))))
    return moments
