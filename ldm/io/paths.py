"""TODO io.paths."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from ldm.config.concepts import CATEGORIES, INDEX_RANGE_RE, get_concept, parse_indexes
from ldm.erasure.methods import METHODS
from ldm.erasure.shift import WeightShift


REPO_ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class ArtifactPaths:
    """One scene and time of one method, model and category below `root`."""

    root: Path
    method: str
    model: str
    category: str
    scene: int
    time: int

    def _folder(self, time: int, method: str) -> Path:
        return self.root / method.lower() / self.model / self.category / f"scene{self.scene}" / f"time{time}"

    def basis(self, index: int) -> Path:
        """SRS-ME and its joint variant share their bases."""
        return self._folder(self.time, "SRS-ME") / f"basis-{index}.safetensors"

    def shift(self, index: int) -> Path:
        """Where this time's own shift of a concept is written."""
        return self._folder(self.time, self.method) / f"shift-{index}.safetensors"

    def find_shift(self, index: int) -> Path:
        """The newest shift of a concept up to this time. Raises ValueError, saying what makes it, when there is none."""
        for time in range(self.time, -1, -1):
            path = self._folder(time, self.method) / f"shift-{index}.safetensors"
            if path.is_file():
                return path
        name = get_concept(self.category, index).name
        raise ValueError(f"no shift that erases {index} {name} at {self.shift(index)}: make it with "
                         f"python train-scripts/{METHODS[self.method].script} --erase_cat {self.category} "
                         f"--erased_index {index} --scenei {self.scene} --timei {self.time}")

    def load_merge(self, text: str) -> tuple[dict[str, WeightShift], str]:
        """'0,1,2', '0-99' or shift files, separated by commas -> shifts by label, and the name of the merge: '012', or 'ori'.

        A label is the concept's index, with its category before it when that is another one. Shifts of another method
        than SRS-ME put its name before that of the merge: 'FMN-012'.
        """
        paths: list[Path] = []
        for piece in filter(None, (piece.strip() for piece in text.split(","))):
            if INDEX_RANGE_RE.fullmatch(piece):
                paths += [self.find_shift(index) for index in parse_indexes(piece, self.category)]
            else:
                paths.append(Path(piece))
        shifts = {}
        for path in paths:
            shift = WeightShift.load(path, "give an index such as 0, or the path of a shift file")
            index, category = shift.metadata.get("erased_index"), shift.metadata.get("erase_cat", self.category)
            if type(index) is not int or category not in CATEGORIES or shift.metadata.get("method", "SRS-ME") not in METHODS:
                raise ValueError(f"{path} does not say which concept it erases, and by which method: make it again")
            label = str(index) if category == self.category else f"{category}{index}"
            if label in shifts:
                raise ValueError(f"--merge names the shift of {label} twice: name each once")
            shifts[label] = shift
        made_by = dict.fromkeys(shift.metadata.get("method", "SRS-ME") for shift in shifts.values())
        prefix = "".join(f"{method}-" for method in made_by) if list(made_by) != ["SRS-ME"] else ""
        return shifts, prefix + merge_name(shifts) or "ori"


def merge_name(labels: Iterable[str]) -> str:
    """Labels as one name: '012'; with longer ones '0-10', and more than three numbers in a row as '0..99'."""
    labels = list(labels)
    if all(len(label) == 1 for label in labels):
        return "".join(labels)
    pieces, start = [], 0
    for k, label in enumerate(labels):
        follows = k + 1 < len(labels) and label.isdigit() and labels[k + 1] == str(int(label) + 1)
        if not follows:
            row = labels[start:k + 1]
            pieces += [f"{row[0]}..{row[-1]}"] if len(row) > 3 else row
            start = k + 1
    return "-".join(pieces)
