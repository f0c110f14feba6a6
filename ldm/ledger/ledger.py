"""TODO ledger.ledger."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from filelock import FileLock, Timeout
import hashlib
import json
import pandas as pd
from pathlib import Path
import time
from ldm.config.concepts import Concept, get_concept, watermark_prompts
from ldm.diffusion.model import DiffusionModel
from ldm.erasure.shift import WeightShift
from ldm.io.files import file_digest, write_text


HISTORY_FILE = "history.jsonl"


@dataclass(frozen=True)
class LedgerEntry:
    """One line after the first: at `time` (UTC, ISO 8601) the concepts of `erase` went out, by the shift that each is mapped to
    (path below the root, digest and what is known of it), and those of `restore` came back."""

    number: int
    time: str
    erase: Mapping[int, Mapping]
    restore: tuple[int, ...]


class Ledger:
    """The history in the file `path`, whose folder the shifts lie in. Raises ValueError when there is none, or when it has been
    tampered with."""

    def __init__(self, path: Path):
        self.path, self.root = Path(path), Path(path).parent
        self.header: dict = {}
        self.entries: list[LedgerEntry] = []
        self.head = ""  # the digest of the last line
        if not self.path.is_file():
            raise ValueError(f"no ledger in {self.root}: begin one with python train-scripts/ledger.py init --root {self.root}")
        self._read(self.path.read_text())

    @classmethod
    def create(cls, path: Path, binding: Mapping, when: str = "") -> Ledger:
        """Begin a history, in place of any that is there, with what `bind` says, at `when` or else now."""
        write_text(path, _line({"number": 0, "time": when or _now(), "before": "", **binding}))
        return cls(path)

    def _read(self, text: str) -> None:
        self._text = text
        self.header, self.entries, self.head, erased = {}, [], "", set()
        for number, line in enumerate(text.splitlines() or [""]):
            try:
                entry = json.loads(line)
                if entry["number"] != number or entry["before"] != self.head:
                    raise ValueError
                if number:
                    change = self._change(entry)
                    if set(change.erase) & erased or not set(change.restore) <= erased:
                        raise ValueError
                    erased = erased - set(change.restore) | set(change.erase)
                    self.entries.append(change)
                else:
                    self.header = entry
                    if not all(isinstance(text, str) for text in (entry["base"], entry["base_digest"], entry["time"], *entry["protected"])):
                        raise ValueError
                    self.concepts  # each is one of its category's
            except (ValueError, KeyError, TypeError, AttributeError):
                raise ValueError(f"{self.path}, line {number + 1}, is not what was written there: get the file back from a copy") from None
            self.head = hashlib.sha256(line.encode()).hexdigest()

    def _change(self, entry: Mapping) -> LedgerEntry:
        """A line as a change. Raises ValueError, KeyError, TypeError or AttributeError for one that no ledger writes."""
        change = LedgerEntry(entry["number"], entry["time"], {int(index): shift for index, shift in entry["erase"].items()}, tuple(entry["restore"]))
        for shift in change.erase.values():
            inside = (self.root / shift["shift"]).resolve().is_relative_to(self.root.resolve())
            if not inside or not all(isinstance(shift[name], str) for name in ("concept", "method", "digest")):
                raise ValueError
        if not set(change.erase) <= set(self.header["concepts"]) or not isinstance(change.time, str):
            raise ValueError
        return change

    @property
    def concepts(self) -> list[Concept]:
        """What may be erased."""
        return [get_concept(self.header["erase_cat"], index) for index in self.header["concepts"]]

    @property
    def prompts(self) -> list[str]:
        """All that a shift is to leave alone, but for its own concept: what is always protected, and the concepts."""
        return [*self.header["protected"], *(concept.prompt for concept in self.concepts)]

    def concept(self, text: str) -> Concept:
        """The ledger's concept of that name, spelling or index. Raises ValueError, listing all names, when there is none."""
        for concept in self.concepts:
            if text.strip().lower() in {str(concept.index), *(name.lower() for name in (concept.name, concept.prompt, *concept.aliases))}:
                return concept
        raise ValueError(f"'{text}' is no concept of this ledger: choose from {', '.join(concept.name for concept in self.concepts)}")

    def state(self, number: int | None = None) -> dict[int, Mapping]:
        """The shifts that are on, by concept, in the order of the indexes: now, or after line `number`."""
        on: dict[int, Mapping] = {}
        for change in self.entries[:number]:
            on = {index: shift for index, shift in on.items() if index not in change.restore} | change.erase
        return dict(sorted(on.items()))

    def last_shift(self, index: int) -> Mapping | None:
        """The shift that a concept was erased by when it last was."""
        return next((change.erase[index] for change in reversed(self.entries) if index in change.erase), None)

    def last_shifts(self) -> dict[str, Mapping]:
        """The last shift of every concept that was ever erased, by name."""
        return {concept.name: entry for concept in self.concepts if (entry := self.last_shift(concept.index))}

    def plan_erasure(self, concepts: Sequence[Concept], anew: bool) -> tuple[dict[int, Mapping], list[Concept]]:
        """To erase `concepts`: the shifts to switch on again, and the concepts whose shift is still to be made, all of them if `anew`.
        Raises ValueError for a concept that is erased and would be `anew`, and for a shift that is not what it was."""
        on, again, new = self.state(), {}, []
        for concept in dict.fromkeys(concepts):
            if concept.index in on and anew:
                raise ValueError(f"{concept.name} is erased already: restore it first, to erase it in another way")
            last = None if anew else self.last_shift(concept.index)
            if last and concept.index not in on:
                self.load(last)
                again[concept.index] = last
            elif not last:
                new.append(concept)
        return again, new

    def history_lines(self) -> list[str]:
        """The history, a sentence for each line."""
        told = [f"{self.header['time']} begun on {self.header['base']}, digest {self.header['base_digest'][:12]}"]
        for change in self.entries:
            parts = {"erased": [f"{entry['concept']} by {entry['method']} ({entry['digest'][:12]})" for entry in change.erase.values()],
                     "restored": [get_concept(self.header["erase_cat"], index).name for index in change.restore]}
            told.append(f"{change.time} " + "; ".join(f"{what} {', '.join(names)}" for what, names in parts.items() if names))
        return told

    def last_changed(self, index: int) -> str:
        """When a concept last went out or came back; empty when it never did."""
        return next((change.time for change in reversed(self.entries) if index in change.erase or index in change.restore), "")

    def shifts(self, number: int | None = None) -> dict[str, WeightShift]:
        """The shifts of `state`, loaded. Raises ValueError for a file that is not the one that was switched on."""
        return {str(index): self.load(entry) for index, entry in self.state(number).items()}

    def load(self, entry: Mapping) -> WeightShift:
        """The shift of an entry of `state`. Raises ValueError for a file that is not the one that was switched on."""
        path = self.root / entry["shift"]
        if not path.is_file() or file_digest(path) != entry["digest"]:
            raise ValueError(f"{path} is {'not the file that was switched on' if path.is_file() else 'missing'}: get it back from a copy")
        return WeightShift.load(path)

    def append(self, erase: Mapping[int, Mapping], restore: Collection[int] = (), when: str = "") -> None:
        """Write one change, at `when` or else now; where others may write too the caller opens the ledger within `locked(root)`, and
        appends there. `erase` maps concepts to what is known of their shifts, `shift` (a path below the root) among it; digests are
        taken here."""
        on = self.state()
        if set(erase) & set(on) or not set(restore) <= set(on):
            raise ValueError("only what is not erased can be erased, and only what is can be given back")
        entries = {str(index): {**entry, "digest": file_digest(self.root / entry["shift"])} for index, entry in sorted(erase.items())}
        entry = {"number": len(self.entries) + 1, "time": when or _now(), "before": self.head, "erase": entries, "restore": sorted(restore)}
        text = self._text + _line(entry)
        write_text(self.path, text)
        self._read(text)


def make_header(model: DiffusionModel, category: str, concepts: Sequence[Concept], also: Sequence[str], source: Mapping) -> dict:
    """What a ledger's first line says: the base model by digest, the concepts that may be erased, and the prompts that every shift
    protects beside the other concepts: the blank one, the watermarks and `also`. `source` is where the model is to be found."""
    return {"base": model.name, "base_digest": model.digest, "erase_cat": category, "concepts": [concept.index for concept in concepts],
            "protected": list(dict.fromkeys(["", *watermark_prompts(), *also])), **source}


def status_table(ledger: Ledger) -> pd.DataFrame:
    """A row for each concept: what it is and since when, and of the shift that is on, or was last: method, rank (directions), size
    in KB, steps, and the most that it moves any other prompt of the ledger (`leak`)."""
    on, rows = ledger.state(), []
    for concept in ledger.concepts:
        last = ledger.last_shift(concept.index) or {}
        rows.append({"index": concept.index, "concept": concept.name, "since": ledger.last_changed(concept.index),
                     "state": "erased" if concept.index in on else "restored" if last else "untouched",
                     "method": last.get("method", ""), "rank": last.get("rank") or "", "KB": last["bytes"] // 1000 if last else "",
                     "steps": last.get("steps", ""), "leak on others": last.get("leak") or ""})
    return pd.DataFrame(rows)


@contextmanager
def ledger_lock(root: Path) -> Iterator[None]:
    """While the block runs, no other process changes the ledger at `root`; says so when it has to wait."""
    Path(root).mkdir(parents=True, exist_ok=True)
    lock = FileLock(Path(root) / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print(f"another process is changing {root}: waiting for it", flush=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _line(entry: Mapping) -> str:
    return json.dumps(entry, ensure_ascii=False) + "\n"


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
