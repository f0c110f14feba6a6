"""Where bases and shifts are kept: `ROOT/MODEL/CATEGORY/sceneI/timeT/{basis,shift}-INDEX.safetensors`.

A shift made at one time of a scene serves all later ones: looking one up takes the newest up to the time asked for.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ldm.concepts import get_concept
from ldm.shift import WeightShift


@dataclass(frozen=True)
class Store:
    """One scene and time of one model and category below `root`."""

    root: Path
    model: str
    category: str
    scene: int
    time: int

    def _folder(self, time: int) -> Path:
        return self.root / self.model / self.category / f"scene{self.scene}" / f"time{time}"

    def basis(self, index: int) -> Path:
        return self._folder(self.time) / f"basis-{index}.safetensors"

    def shift(self, index: int) -> Path:
        """Where this time's own shift of a concept is written."""
        return self._folder(self.time) / f"shift-{index}.safetensors"

    def find_shift(self, index: int) -> Path:
        """The newest shift of a concept up to this time. Raises ValueError, saying what makes it, when there is none."""
        for time in range(self.time, -1, -1):
            path = self._folder(time) / f"shift-{index}.safetensors"
            if path.is_file():
                return path
        name = get_concept(self.category, index).name
        raise ValueError(f"no shift that erases {index} {name} at {self.shift(index)}: make it with "
                         f"python train-scripts/SRS_ME.py --erase_cat {self.category} --erased_index {index} "
                         f"--scenei {self.scene} --timei {self.time}")

    def load_merge(self, text: str) -> tuple[dict[str, WeightShift], str]:
        """'0,1,2' or shift files, separated by commas -> shifts by label, and the name of the merge: '012', or 'ori'.

        A label is the concept's index, with its category before it when that is another one.
        """
        shifts = {}
        for piece in filter(None, (piece.strip() for piece in text.split(","))):
            path = self.find_shift(get_concept(self.category, int(piece)).index) if piece.isdigit() else Path(piece)
            shift = WeightShift.load(path, "give an index such as 0, or the path of a shift file")
            label = str(shift.recipe.get("erased_index", path.stem))
            if shift.recipe.get("erase_cat", self.category) != self.category:
                label = f"{shift.recipe['erase_cat']}{label}"
            if label in shifts:
                raise ValueError(f"--merge names the shift of {label} twice: name each once")
            shifts[label] = shift
        return shifts, ("" if all(len(label) == 1 for label in shifts) else "-").join(shifts) or "ori"
