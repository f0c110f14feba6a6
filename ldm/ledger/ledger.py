"""What an owner has erased and restored: one append-only history, from which a model's state and weights follow.

`history.jsonl` is all there is beside the shifts. Its first line, the header, names the base model by its digest, the
concepts, each whole, and what else is protected; every further line is one entry: the shifts that were activated, each
with its file's digest, and the concepts that were restored or added. A line holds the digest of the line before, so
that none can be changed or left out unseen. It is written under a lock, whole or not at all. No torch here, but where
a shift is loaded.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.config.concepts import Concept, always_protected_prompts, identity_of
from ldm.config.settings import did_you_mean
from ldm.config.templates import without_article
from ldm.io.checks import is_json
from ldm.io.errors import MissingFileError
from ldm.io.files import file_digest, write_text
from ldm.ledger.lines import (
    MADE_UP,
    VERSION,
    LedgerEntry,
    format_entry,
    parse_entry,
    parse_header,
    read_line,
    some_of,
    write_line,
)

if TYPE_CHECKING:
    import pandas as pd

    from ldm.diffusion.model import DiffusionModel
    from ldm.erasure.shift import WeightShift

HISTORY_FILE = "history.jsonl"
_REPAIR = ": the ledger's repair cuts it off, into a file beside it"


def history_path(path: Path) -> Path:
    """Return the history file of a ledger that is named by its folder, or by that file."""
    return path if path.suffix == ".jsonl" else path / HISTORY_FILE


class Ledger:
    """The history in the file `path`, whose folder the shifts lie in. Everything in it is by concepts' labels.

    Raises MissingFileError when there is none, and ValueError when it has been tampered with.
    """

    def __init__(self, path: Path):
        self.path, self.root = Path(path), Path(path).parent
        if not self.path.is_file():
            raise MissingFileError(f"no ledger in {self.root}", "ledger", ledger_dir=self.root)
        try:
            self._read(self.path.read_text(encoding="utf-8"))
        except UnicodeDecodeError as error:
            raise ValueError(f"{self.path} is no text, or its last line is torn{_REPAIR}") from error

    @classmethod
    def create(cls, path: Path, header: Mapping[str, Any], when: str = "") -> Ledger:
        """Begin a history, in place of any that is there, with what `make_header` says, at `when` or else now."""
        text = write_line({"index": 0, "time": when or _now(), "prev_hash": "", **header})
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
        self.header: dict[str, Any] = {}
        self.entries: list[LedgerEntry] = []
        self.last_hash = ""
        self._concepts: dict[str, Concept] = {}  # by label, as they came in
        self._labels: dict[str, str] = {}  # by the identity of each spelling
        self._erased: set[str] = set()
        lines = self._text.split("\n")[:-1]  # at newlines alone: a text in them may hold other separators
        for index, line in enumerate(lines):
            try:
                self._take_in(index, line)
            except MADE_UP:
                is_torn = 0 < index == len(lines) - 1 and not is_json(line)
                advice = f"it is torn{_REPAIR}" if is_torn else "get the file back from a copy"
                raise ValueError(f"{self.path}, line {index + 1}, is not what was written there: {advice}") from None
            self.last_hash = hashlib.sha256(line.encode()).hexdigest()

    def _take_in(self, index: int, line: str) -> None:
        """Read one line more. Raises one of `MADE_UP` for one that no ledger writes there."""
        content = read_line(line, self.version if index else None)
        if content["index"] != index or content["prev_hash"] != self.last_hash:
            raise ValueError
        if not index:
            self._know(parse_header(content))
            self.header = content
            return
        entry = parse_entry(content, self._concepts, self.version)
        if set(entry.erase) & self._erased or not set(entry.restore) <= self._erased:
            raise ValueError
        self._erased = self._erased - set(entry.restore) | set(entry.erase)
        self._know(entry.add)
        self.entries.append(entry)

    def _know(self, concepts: Sequence[Concept]) -> None:
        for concept in concepts:
            self._concepts[concept.label] = concept
            for spelling in concept.spellings:
                self._labels.setdefault(identity_of(spelling), concept.label)

    @property
    def version(self) -> int:
        """Return the version of the history's lines."""
        return self.header.get("version", 1)

    @property
    def category(self) -> str:
        """Return the category that the concepts' indexes count, or `OWN` where its owner named them by their texts."""
        return self.header["category"]

    @property
    def concepts(self) -> list[Concept]:
        """What may be erased."""
        return list(self._concepts.values())

    def prompts_after(self, index: int) -> list[str]:
        """Return what `prompts` were after entry `index`."""
        later = {concept.label for entry in self.entries[index:] for concept in entry.add}
        concepts = [concept for concept in self.concepts if concept.label not in later]
        return [*self.header["protected"], *(concept.prompt for concept in concepts)]

    @property
    def asked_for(self) -> list[str]:
        """The prompts that the owner asked to protect, without those that always are."""
        return [prompt for prompt in self.header["protected"] if prompt not in always_protected_prompts()]

    @property
    def retain(self) -> list[str]:
        """The prompts that the owner asked shifts to change little, though none protects them exactly."""
        return self.header.get("retain", [])

    @property
    def prompts(self) -> list[str]:
        """All that a shift is to leave alone, but for its own concept: what is always protected, and the concepts."""
        return self.prompts_after(len(self.entries))

    def find(self, text: str) -> Concept | None:
        """Return the ledger's concept of that name, spelling or index; None where there is none."""
        for identity in (identity_of(text), identity_of(without_article(" ".join(text.split())))):
            if identity in self._labels:
                return self._concepts[self._labels[identity]]
        return self._concepts.get(text.strip()) if text.strip().isdigit() else None

    def concept(self, text: str) -> Concept:
        """Return what `find` does. Raises ValueError, with the nearest name and others, where there is none."""
        found = self.find(text)
        if found is None:
            names = [concept.name for concept in self.concepts]
            near = did_you_mean(text, names)
            raise ValueError(f"'{text}' is no concept of this ledger{near}: choose from {some_of(names)}")
        return found

    def _in_order(self, labels: Collection[str]) -> list[str]:
        """Return labels by index, and those of own concepts after them, as these came into the ledger."""
        order = sorted(self.concepts, key=lambda concept: (concept.is_own, concept.index))
        return [concept.label for concept in order if concept.label in labels]

    def active_shifts(self, index: int | None = None) -> dict[str, Mapping[str, Any]]:
        """Return the records of the shifts that are active, by label in order: now, or after entry `index`."""
        active: dict[str, Mapping[str, Any]] = {}
        for entry in self.entries[:index]:
            remaining = {label: record for label, record in active.items() if label not in entry.restore}
            active = {**remaining, **entry.erase}
        return {label: active[label] for label in self._in_order(active)}

    def last_shift(self, label: str) -> Mapping[str, Any] | None:
        """Return the record of the shift that a concept was erased by when it last was."""
        for entry in reversed(self.entries):
            if label in entry.erase:
                return entry.erase[label]
        return None

    def last_shifts(self) -> dict[str, Mapping[str, Any]]:
        """Return the record of the last shift of every concept that was ever erased, by name."""
        records = {}
        for concept in self.concepts:
            record = self.last_shift(concept.label)
            if record:
                records[concept.name] = record
        return records

    def max_leakage_others(self, label: str) -> float | None:
        """Return the largest leakage of a concept's last shift on other prompts, as it was measured; None for unknown.

        What was added after the shift was made, which it does not protect, is among them.
        """
        largest: float | None = None
        digest = ""
        for entry in self.entries:
            record = entry.erase.get(label, {"digest": digest})
            if record["digest"] != digest:
                digest, largest = record["digest"], record.get("max_leakage_others")
            if largest is not None:
                largest = max(largest, entry.leakage.get(label, largest))
        return largest

    def plan_erasure(
        self, concepts: Sequence[Concept], anew: bool
    ) -> tuple[dict[str, Mapping[str, Any]], list[Concept]]:
        """Return, to erase `concepts`, the records of shifts to reuse and the concepts whose shift is still to be made.

        With `anew` all are to be made. Raises ValueError for a concept that is erased and would be made `anew`, and for
        a shift that is not what it was.
        """
        active, missing = self.active_shifts(), []
        reused: dict[str, Mapping[str, Any]] = {}
        for concept in dict.fromkeys(concepts):
            if concept.label in active and anew:
                raise ValueError(f"{concept.name} is erased already: restore it first, to erase it in another way")
            last = None if anew else self.last_shift(concept.label)
            if last and concept.label not in active:
                self.load(last)
                reused[concept.label] = last
            elif not last:
                missing.append(concept)
        return reused, missing

    def history_lines(self) -> list[str]:
        """Return the history, a sentence for each line."""
        lines = [
            f"{self.header['time']} begun on {self.header['base_model']}, digest {self.header['base_digest'][:12]}"
        ]
        for entry in self.entries:
            erased: list[str] = []
            weak: list[str] = []
            for record in entry.erase.values():
                line = f"{record['concept']} by {record['method']} ({record['digest'][:12]})"
                (erased if record.get("is_erased", True) else weak).append(line)
            restored = [self._concepts[label].name for label in entry.restore]
            added = [concept.name for concept in entry.add]
            changes = (("erased", erased), ("too weak to erase", weak), ("restored", restored), ("added", added))
            parts = [f"{what} {', '.join(names)}" for what, names in changes if names]
            lines.append(f"{entry.time} {'; '.join(parts)}")
        return lines

    def last_changed(self, label: str) -> str:
        """Return when a concept was last erased or restored; empty when it never was."""
        for entry in reversed(self.entries):
            if label in entry.erase or label in entry.restore:
                return entry.time
        return ""

    def shifts(self, index: int | None = None) -> dict[str, WeightShift]:
        """Return `active_shifts`, loaded. Raises ValueError for a file that is not the one that was activated."""
        return {label: self.load(record) for label, record in self.active_shifts(index).items()}

    def load(self, record: Mapping[str, Any]) -> WeightShift:
        """Return the shift of a record. Raises ValueError for a file that is not the one that was activated."""
        from ldm.erasure.shift import WeightShift

        return WeightShift.load(self.check_file(record), checked=True)

    def check_file(self, record: Mapping[str, Any]) -> Path:
        """Return the file of a record's shift. Raises ValueError for one that is not the one that was activated."""
        path = self.root / record["shift"]
        if not path.is_file() or file_digest(path) != record["digest"]:
            what = "not the file that was activated" if path.is_file() else "missing"
            raise ValueError(f"{path} is {what}: get it back from a copy")
        return path

    def append(self, erase: Mapping[str, Mapping[str, Any]], restore: Collection[str] = (), when: str = "") -> None:
        """Write one entry, at `when` or else now.

        Where others may write too the caller opens the ledger within `ledger_lock(root)`, and appends there. `erase`
        maps labels to the records of their shifts, `shift` (a path below the root) among them; digests are taken here.
        Raises ValueError for a concept that is erased already, or restored without being erased, and for no concept.
        """
        if not erase and not restore:
            raise ValueError("nothing was written, since nothing is erased or restored by it")
        active = self.active_shifts()
        if set(erase) & set(active) or not set(restore) <= set(active):
            raise ValueError("only what is not erased can be erased, and only what is erased can be restored")
        unknown = sorted(set(erase) - set(self._concepts))
        if unknown:
            raise ValueError(f"nothing was written, since '{unknown[0]}' is no concept of this ledger")
        records = {}
        for label in self._in_order(erase):
            records[label] = {**erase[label], "digest": file_digest(self.root / erase[label]["shift"])}
        self._write(LedgerEntry(len(self.entries) + 1, when or _now(), records, tuple(self._in_order(restore))))

    def add(self, concepts: Sequence[Concept], leakage: Mapping[str, float], when: str = "") -> None:
        """Write one entry that adds concepts, at `when` or else now. The caller holds the lock, as for `append`.

        `leakage` is that of `LedgerEntry`. Raises ValueError as `check_addition`.
        """
        self.check_addition(concepts)
        self._write(LedgerEntry(len(self.entries) + 1, when or _now(), {}, (), tuple(concepts), leakage))

    def check_addition(self, concepts: Sequence[Concept]) -> None:
        """Raise ValueError for a concept that is in the ledger, by any spelling, and for a ledger of version 1."""
        if self.version == 1:
            raise ValueError(f"{self.path} is of an older version, to which nothing can be added: migrate it first")
        for concept in concepts:
            for spelling in concept.spellings:
                known = self._labels.get(identity_of(spelling))
                if known is not None:
                    name = self._concepts[known].name
                    raise ValueError(f"'{spelling}' is in this ledger already, as {name}: leave it out")

    def _write(self, entry: LedgerEntry) -> None:
        text = self._text + format_entry(entry, self.last_hash, self.version)
        self._check_new(self.path, text)
        write_text(self.path, text)
        self._read(text)


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
        "version": VERSION,
        "base_model": model.name,
        "base_digest": model.digest,
        "category": category,
        "concepts": [concept.to_dict() for concept in concepts],
        "protected": list(dict.fromkeys([*always_protected_prompts(), *extra_prompts])),
        **source,
    }


def status_table(ledger: Ledger) -> pd.DataFrame:
    """Return a row for each concept: whether it is erased, restored or never_erased, since when, and its last shift.

    It is too_weak where its shift acts, and has not the effect by which a concept is called erased. Of the shift:
    method, rank (directions), size in KB, iterations, effect, how much it changes its own prompt, and the largest
    leakage on another prompt of the ledger. Where no concept has an index there is no column for it.
    """
    import pandas as pd

    active, rows = ledger.active_shifts(), []
    for concept in ledger.concepts:
        last = ledger.last_shift(concept.label) or {}
        state = "restored" if last else "never_erased"
        if concept.label in active:
            state = "erased" if last.get("is_erased", True) else "too_weak"
        rows.append(
            {
                "index": "" if concept.is_own else concept.index,
                "concept": concept.name,
                "since": ledger.last_changed(concept.label),
                "state": state,
                "method": last.get("method", ""),
                "rank": last.get("rank") or "",
                "KB": last["bytes"] // 1000 if "bytes" in last else "",
                "iterations": last.get("iterations", ""),
                "effect": _cell(last.get("effect")),
                "target_change": _cell(last.get("target_change")),
                "max_leakage_others": _cell(ledger.max_leakage_others(concept.label)),
            }
        )
    table = pd.DataFrame(rows)
    return table if any(not concept.is_own for concept in ledger.concepts) else table.drop(columns="index")


def _cell(value: float | None) -> float | str:
    """Return a number as a table has it, where one that is not known is empty, and none of 0 is."""
    return "" if value is None else value


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
