"""Where artifacts are kept: `ROOT/METHOD/MODEL/CATEGORY/sceneI/timeT/{basis,shift}-LABEL.safetensors`.

A shift made at one time of a scene serves all later ones: looking one up takes the newest up to the time asked for.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ldm.io.errors import MissingFileError

SHIFT_SUFFIX = ".safetensors"
MAX_NAME_CHARS = 100  # of a merge, by which folders are called
REPO_ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class ArtifactPaths:
    """The paths of one scene and time of one method, model and category below `root`."""

    root: Path
    method: str
    model: str
    category: str
    scene: int
    time: int

    def _folder(self, time: int, method: str) -> Path:
        return self.root / method.lower() / self.model / self.category / f"scene{self.scene}" / f"time{time}"

    def basis(self, label: str | int) -> Path:
        """Return where a concept's null space basis is kept, which SRS-ME and its joint variant share."""
        return self._folder(self.time, "SRS-ME") / f"basis-{label}.safetensors"

    def find_basis(self, label: str | int) -> Path:
        """Return the path of a concept's basis. Raises MissingFileError when there is none."""
        path = self.basis(label)
        if not path.is_file():
            raise MissingFileError(f"no null space basis {path}", "basis", **self.details(label))
        return path

    def shift(self, label: str | int) -> Path:
        """Return where this time's own shift of a concept is written."""
        return self._folder(self.time, self.method) / f"shift-{label}.safetensors"

    def find_shift(self, label: str | int, name: str = "") -> Path:
        """Return the newest shift of a concept, `name`, up to this time. Raises MissingFileError if there is none."""
        for time in range(self.time, -1, -1):
            path = self._folder(time, self.method) / f"shift-{label}.safetensors"
            if path.is_file():
                return path
        message = f"no shift that erases {label}{f' {name}' if name else ''} at {self.shift(label)}"
        raise MissingFileError(message, "shift", **self.details(label))

    def all_shifts(self) -> list[Path]:
        """Return the newest shift of every concept up to this time, in order of their names."""
        found: dict[str, Path] = {}
        for time in range(self.time + 1):
            folder = self._folder(time, self.method)
            found |= {path.name: path for path in folder.glob(f"shift-*{SHIFT_SUFFIX}")}
        return [found[name] for name in sorted(found)]

    def details(self, label: str | int) -> dict[str, object]:
        """Return what a MissingFileError says about a concept's basis or shift."""
        place = {"scene": self.scene, "scene_time": self.time}
        return {"method": self.method, "category": self.category, "erased_index": label, **place}


def merge_name(labels: Iterable[str]) -> str:
    """Return labels as one name: '012'; with longer ones '0-10', and more than three numbers in a row as '0..99'.

    Of many names it is their number and a digest of them.
    """
    labels = list(labels)
    if all(len(label) == 1 for label in labels):
        return "".join(labels)
    if len("-".join(labels)) > MAX_NAME_CHARS and not all(label.isdigit() for label in labels):
        digest = hashlib.sha256("\n".join(labels).encode()).hexdigest()[:8]
        return f"{len(labels)}-concepts-{digest}"
    pieces, start = [], 0
    for k, label in enumerate(labels):
        follows = k + 1 < len(labels) and label.isdigit() and labels[k + 1] == str(int(label) + 1)
        if not follows:
            row = labels[start : k + 1]
            pieces += [f"{row[0]}..{row[-1]}"] if len(row) > 3 else row
            start = k + 1
    return "-".join(pieces)
