"""What an owner has erased and restored: one append-only history, from which a model's state and weights follow.

`history.jsonl` is all there is beside the shifts. Its first line, the header, names the base model by its digest, the
concepts and what else is protected; every further line is one entry: the shifts that were activated, each with its
file's digest, and the concepts that were restored. A line holds the digest of the line before, so that none can be
changed or left out unseen. It is written under a lock, whole or not at all. No torch here, but where a shift is loaded.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from ldm.config.concepts import Concept, always_protected_prompts, get_concept
from ldm.config.methods import METHODS
from ldm.io.checks import is_count, is_json, is_number, is_text
from ldm.io.errors import MissingFileError
from ldm.io.files import file_digest, write_text
from ldm.io.legacy import upgrade

if TYPE_CHECKING:
    import pandas as pd

    from ldm.diffusion.model import DiffusionModel
    from ldm.erasure.shift import WeightShift

HISTORY_FILE = "history.jsonl"
_REPAIR = ": the ledger's repair cuts it off, into a file beside it"


def history_path(path: Path) -> Path:
    """Return the history file of a ledger that is named by its folder, or by that file."""
    return path if path.suffix == ".jsonl" else path / HISTORY_FILE


@dataclass(frozen=True)
class LedgerEntry:
    """One line after the header: at `time` (UTC, ISO 8601) concepts were erased and restored.

    `erase` maps each erased concept to its shift's record (path below the root, digest and what is known of it).
    """

    index: int
    time: str
    erase: Mapping[int, Mapping[str, Any]]
    restore: tuple[int, ...]


class Ledger:
    """The history in the file `path`, whose folder the shifts lie in.

    Raises MissingFileError when there is none, and ValueError when it has been tampered with.
    """

    def __init__(self, path: Path):
        self.path, self.root = Path(path), Path(path).parent
        self.header: dict[str, Any] = {}
        self.entries: list[LedgerEntry] = []
        self.last_hash = ""
        if not self.path.is_file():
            raise MissingFileError(f"no ledger in {self.root}", "ledger", ledger_dir=self.root)
        try:
            self._read(self.path.read_text(encoding="utf-8"))
        except UnicodeDecodeError as error:
            raise ValueError(f"{self.path} is no text, or its last line is torn{_REPAIR}") from error

    @classmethod
    def create(cls, path: Path, header: Mapping[str, Any], when: str = "") -> Ledger:
        """Begin a history, in place of any that is there, with what `make_header` says, at `when` or else now."""
        text = _line({"index": 0, "time": when or _now(), "prev_hash": "", **header})
        cls._check_new(path, text)
        write_text(path, text)
        return cls(path)

    @classmethod
    def _check_new(cls, path: Path, text: str) -> None:
        """Raise ValueError for a history that could not be read back, which would lock its owner out."""
        try:
            cls.from_text(path, text)
        except ValueError as error:
            last = text.rstrip("\n").rsplit("\n", 1)[-1]
            raise ValueError(
                f"nothing was written, since {path} could not be read with the line {last[:200]}"
            ) from error

    @classmethod
    def from_text(cls, path: Path, text: str) -> Ledger:
        """Return the ledger that a history would be, whether it is written or not. Raises ValueError as the class."""
        ledger = cls.__new__(cls)
        ledger.path, ledger.root = Path(path), Path(path).parent
        ledger._read(text)
        return ledger

    def _read(self, text: str) -> None:
        self._text = text if text.endswith("\n") else f"{text}\n"
        self.header, self.entries, self.last_hash = {}, [], ""
        erased: set[int] = set()
        lines = self._text.split("\n")[:-1]  # at newlines alone: a text in them may hold other separators
        for index, line in enumerate(lines):
            try:
                content = upgrade(json.loads(line))
                if content["index"] != index or content["prev_hash"] != self.last_hash:
                    raise ValueError
                if index:
                    entry = self._parse_entry(content)
                    if set(entry.erase) & erased or not set(entry.restore) <= erased:
                        raise ValueError
                    erased = erased - set(entry.restore) | set(entry.erase)
                    self.entries.append(entry)
                else:
                    self._parse_header(content)
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                is_torn = 0 < index == len(lines) - 1 and not is_json(line)
                advice = f"it is torn{_REPAIR}" if is_torn else "get the file back from a copy"
                raise ValueError(f"{self.path}, line {index + 1}, is not what was written there: {advice}") from None
            self.last_hash = hashlib.sha256(line.encode()).hexdigest()

    def _parse_header(self, content: dict[str, Any]) -> None:
        """Take the first line in. Raises ValueError, KeyError or TypeError for one that no ledger writes."""
        self.header = content
        texts = [content["base_model"], content["base_digest"], content["time"], *content["protected"]]
        sources = [content.get(name) for name in ("model", "ckpt_path", "config_path", "variant")]
        if not all(isinstance(text, str) for text in [*texts, *(source for source in sources if source is not None)]):
            raise ValueError
        if not content["concepts"] or not all(type(index) is int for index in content["concepts"]):
            raise ValueError
        _ = self.concepts  # each is one of its category's

    def _parse_entry(self, content: Mapping[str, Any]) -> LedgerEntry:
        """Return a line's entry. Raises ValueError, KeyError, TypeError or AttributeError for what no ledger writes."""
        erase = {int(index): record for index, record in content["erase"].items()}
        entry = LedgerEntry(content["index"], content["time"], erase, tuple(content["restore"]))
        for record in entry.erase.values():
            _check_record(record)
        restored = content["restore"]
        if not all(type(index) is int for index in restored) or len(set(restored)) < len(restored):
            raise ValueError
        if not set(entry.erase) <= set(self.header["concepts"]) or not isinstance(entry.time, str):
            raise ValueError
        return entry

    @property
    def concepts(self) -> list[Concept]:
        """What may be erased."""
        return [get_concept(self.header["category"], index) for index in self.header["concepts"]]

    @property
    def prompts(self) -> list[str]:
        """All that a shift is to leave alone, but for its own concept: what is always protected, and the concepts."""
        return [*self.header["protected"], *(concept.prompt for concept in self.concepts)]

    def concept(self, text: str) -> Concept:
        """Return the ledger's concept of that name, spelling or index. Raises ValueError, with all names, for none."""
        for concept in self.concepts:
            if concept.is_named(text) or text.strip() == str(concept.index):
                return concept
        names = ", ".join(concept.name for concept in self.concepts)
        raise ValueError(f"'{text}' is no concept of this ledger: choose from {names}")

    def active_shifts(self, index: int | None = None) -> dict[int, Mapping[str, Any]]:
        """Return the records of the shifts that are active, by concept in order: now, or after entry `index`."""
        active: dict[int, Mapping[str, Any]] = {}
        for entry in self.entries[:index]:
            remaining = {concept: record for concept, record in active.items() if concept not in entry.restore}
            active = {**remaining, **entry.erase}
        return dict(sorted(active.items()))

    def last_shift(self, index: int) -> Mapping[str, Any] | None:
        """Return the record of the shift that a concept was erased by when it last was."""
        for entry in reversed(self.entries):
            if index in entry.erase:
                return entry.erase[index]
        return None

    def last_shifts(self) -> dict[str, Mapping[str, Any]]:
        """Return the record of the last shift of every concept that was ever erased, by name."""
        records = {}
        for concept in self.concepts:
            record = self.last_shift(concept.index)
            if record:
                records[concept.name] = record
        return records

    def plan_erasure(
        self, concepts: Sequence[Concept], anew: bool
    ) -> tuple[dict[int, Mapping[str, Any]], list[Concept]]:
        """Return, to erase `concepts`, the records of shifts to reuse and the concepts whose shift is still to be made.

        With `anew` all are to be made. Raises ValueError for a concept that is erased and would be made `anew`, and for
        a shift that is not what it was.
        """
        active, missing = self.active_shifts(), []
        reused: dict[int, Mapping[str, Any]] = {}
        for concept in dict.fromkeys(concepts):
            if concept.index in active and anew:
                raise ValueError(f"{concept.name} is erased already: restore it first, to erase it in another way")
            last = None if anew else self.last_shift(concept.index)
            if last and concept.index not in active:
                self.load(last)
                reused[concept.index] = last
            elif not last:
                missing.append(concept)
        return reused, missing

    def history_lines(self) -> list[str]:
        """Return the history, a sentence for each line."""
        lines = [
            f"{self.header['time']} begun on {self.header['base_model']}, digest {self.header['base_digest'][:12]}"
        ]
        for entry in self.entries:
            erased = [
                f"{record['concept']} by {record['method']} ({record['digest'][:12]})"
                for record in entry.erase.values()
            ]
            restored = [get_concept(self.header["category"], index).name for index in entry.restore]
            parts = [
                f"{what} {', '.join(names)}" for what, names in (("erased", erased), ("restored", restored)) if names
            ]
            lines.append(f"{entry.time} {'; '.join(parts)}")
        return lines

    def last_changed(self, index: int) -> str:
        """Return when a concept was last erased or restored; empty when it never was."""
        for entry in reversed(self.entries):
            if index in entry.erase or index in entry.restore:
                return entry.time
        return ""

    def shifts(self, index: int | None = None) -> dict[str, WeightShift]:
        """Return `active_shifts`, loaded. Raises ValueError for a file that is not the one that was activated."""
        return {str(concept): self.load(record) for concept, record in self.active_shifts(index).items()}

    def load(self, record: Mapping[str, Any]) -> WeightShift:
        """Return the shift of a record. Raises ValueError for a file that is not the one that was activated."""
        from ldm.erasure.shift import WeightShift

        path = self.root / record["shift"]
        if not path.is_file() or file_digest(path) != record["digest"]:
            what = "not the file that was activated" if path.is_file() else "missing"
            raise ValueError(f"{path} is {what}: get it back from a copy")
        return WeightShift.load(path, checked=True)

    def append(self, erase: Mapping[int, Mapping[str, Any]], restore: Collection[int] = (), when: str = "") -> None:
        """Write one entry, at `when` or else now.

        Where others may write too the caller opens the ledger within `ledger_lock(root)`, and appends there. `erase`
        maps concepts to the records of their shifts, `shift` (a path below the root) among them; digests are taken
        here. Raises ValueError for a concept that is erased already, or restored without being erased.
        """
        active = self.active_shifts()
        if set(erase) & set(active) or not set(restore) <= set(active):
            raise ValueError("only what is not erased can be erased, and only what is erased can be restored")
        records = {}
        for index, record in sorted(erase.items()):
            records[str(index)] = {**record, "digest": file_digest(self.root / record["shift"])}
        content = {
            "index": len(self.entries) + 1,
            "time": when or _now(),
            "prev_hash": self.last_hash,
            "erase": records,
            "restore": sorted(restore),
        }
        text = self._text + _line(content)
        self._check_new(self.path, text)
        write_text(self.path, text)
        self._read(text)


def _check_record(record: Mapping[str, Any]) -> None:
    """Raise ValueError, KeyError, TypeError or AttributeError for a shift's record that no ledger writes."""
    texts = [record[name] for name in ("concept", "method", "digest", "shift")]
    counts = [record.get(name) for name in ("rank", "bytes", "iterations")]
    numbers = [record.get(name) for name in ("seconds", "peak_gib", "max_leakage_others")]
    known = [is_text(text) for text in texts] + [record["method"] in METHODS]
    known += [count is None or is_count(count) for count in counts]
    known += [number is None or is_number(number) for number in numbers]
    path = PurePosixPath(record["shift"])  # below the ledger's folder, whatever its folders are linked to
    if not all(known) or path.is_absolute() or ".." in path.parts or "\\" in record["shift"]:
        raise ValueError


def make_header(
    model: DiffusionModel,
    category: str,
    concepts: Sequence[Concept],
    extra_prompts: Sequence[str],
    source: Mapping[str, Any],
) -> dict[str, Any]:
    """Return what a ledger's first line says.

    It names the base model by digest, the concepts that may be erased, and the prompts that every shift protects beside
    the other concepts: the empty one, the watermarks and `extra_prompts`. `source` is where the model is to be found.
    """
    return {
        "base_model": model.name,
        "base_digest": model.digest,
        "category": category,
        "concepts": [concept.index for concept in concepts],
        "protected": list(dict.fromkeys([*always_protected_prompts(), *extra_prompts])),
        **source,
    }


def status_table(ledger: Ledger) -> pd.DataFrame:
    """Return a row for each concept: whether it is erased, restored or never_erased, since when, and its last shift.

    Of that: method, rank (directions), size in KB, iterations, and the largest leakage on another prompt of the ledger.
    """
    import pandas as pd

    active, rows = ledger.active_shifts(), []
    for concept in ledger.concepts:
        last = ledger.last_shift(concept.index) or {}
        state = "restored" if last else "never_erased"
        rows.append(
            {
                "index": concept.index,
                "concept": concept.name,
                "since": ledger.last_changed(concept.index),
                "state": "erased" if concept.index in active else state,
                "method": last.get("method", ""),
                "rank": last.get("rank") or "",
                "KB": last["bytes"] // 1000 if "bytes" in last else "",
                "iterations": last.get("iterations", ""),
                "max_leakage_others": last.get("max_leakage_others") or "",
            }
        )
    return pd.DataFrame(rows)


def _line(content: Mapping[str, Any]) -> str:
    return json.dumps(content, ensure_ascii=False) + "\n"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
