"""What an owner has erased and given back: one append-only history, from which the state of a model follows, and its weights.

`history.jsonl` is all there is beside the shifts. Its first line binds the base model, the concepts and what else is protected;
every further line is one change: the shifts switched on, each with its file's digest, and the concepts given back. A line holds the
digest of the line before, so that none can be changed or left out unseen. It is written under a lock, whole or not at all.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import pandas as pd
import psutil
import torch
from filelock import FileLock, Timeout
from torch import nn

from ldm.attention import kv_layers
from ldm.checkpoint import check_base, file_digest
from ldm.concepts import Concept, get_concept, watermarks
from ldm.erasure import make_shifts, solve
from ldm.images import write_text
from ldm.losses import METHODS
from ldm.model import TextToImage, settings
from ldm.shift import SeparableShift, WeightShift, applied, leaks
from ldm.store import Store

HISTORY = "history.jsonl"


@dataclass(frozen=True)
class Change:
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
        self.binding: dict = {}
        self.changes: list[Change] = []
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
        self.binding, self.changes, self.head, erased = {}, [], "", set()
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
                    self.changes.append(change)
                else:
                    self.binding = entry
                    if not all(isinstance(text, str) for text in (entry["base"], entry["base_digest"], entry["time"], *entry["protected"])):
                        raise ValueError
                    self.concepts  # each is one of its category's
            except (ValueError, KeyError, TypeError, AttributeError):
                raise ValueError(f"{self.path}, line {number + 1}, is not what was written there: get the file back from a copy") from None
            self.head = hashlib.sha256(line.encode()).hexdigest()

    def _change(self, entry: Mapping) -> Change:
        """A line as a change. Raises ValueError, KeyError, TypeError or AttributeError for one that no ledger writes."""
        change = Change(entry["number"], entry["time"], {int(index): shift for index, shift in entry["erase"].items()}, tuple(entry["restore"]))
        for shift in change.erase.values():
            inside = (self.root / shift["shift"]).resolve().is_relative_to(self.root.resolve())
            if not inside or not all(isinstance(shift[name], str) for name in ("concept", "method", "digest")):
                raise ValueError
        if not set(change.erase) <= set(self.binding["concepts"]) or not isinstance(change.time, str):
            raise ValueError
        return change

    @property
    def concepts(self) -> list[Concept]:
        """What may be erased."""
        return [get_concept(self.binding["erase_cat"], index) for index in self.binding["concepts"]]

    @property
    def prompts(self) -> list[str]:
        """All that a shift is to leave alone, but for its own concept: what is always protected, and the concepts."""
        return [*self.binding["protected"], *(concept.prompt for concept in self.concepts)]

    def concept(self, text: str) -> Concept:
        """The ledger's concept of that name, spelling or index. Raises ValueError, listing all names, when there is none."""
        for concept in self.concepts:
            if text.strip().lower() in {str(concept.index), *(name.lower() for name in (concept.name, concept.prompt, *concept.aliases))}:
                return concept
        raise ValueError(f"'{text}' is no concept of this ledger: choose from {', '.join(concept.name for concept in self.concepts)}")

    def state(self, number: int | None = None) -> dict[int, Mapping]:
        """The shifts that are on, by concept, in the order of the indexes: now, or after line `number`."""
        on: dict[int, Mapping] = {}
        for change in self.changes[:number]:
            on = {index: shift for index, shift in on.items() if index not in change.restore} | change.erase
        return dict(sorted(on.items()))

    def last_shift(self, index: int) -> Mapping | None:
        """The shift that a concept was erased by when it last was."""
        return next((change.erase[index] for change in reversed(self.changes) if index in change.erase), None)

    def last_shifts(self) -> dict[str, Mapping]:
        """The last shift of every concept that was ever erased, by name."""
        return {concept.name: entry for concept in self.concepts if (entry := self.last_shift(concept.index))}

    def due(self, concepts: Sequence[Concept], anew: bool) -> tuple[dict[int, Mapping], list[Concept]]:
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

    def story(self) -> list[str]:
        """The history, a sentence for each line."""
        told = [f"{self.binding['time']} begun on {self.binding['base']}, digest {self.binding['base_digest'][:12]}"]
        for change in self.changes:
            parts = {"erased": [f"{entry['concept']} by {entry['method']} ({entry['digest'][:12]})" for entry in change.erase.values()],
                     "restored": [get_concept(self.binding["erase_cat"], index).name for index in change.restore]}
            told.append(f"{change.time} " + "; ".join(f"{what} {', '.join(names)}" for what, names in parts.items() if names))
        return told

    def since(self, index: int) -> str:
        """When a concept last went out or came back; empty when it never did."""
        return next((change.time for change in reversed(self.changes) if index in change.erase or index in change.restore), "")

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
        entry = {"number": len(self.changes) + 1, "time": when or _now(), "before": self.head, "erase": entries, "restore": sorted(restore)}
        text = self._text + _line(entry)
        write_text(self.path, text)
        self._read(text)


def bind(model: TextToImage, category: str, concepts: Sequence[Concept], also: Sequence[str], source: Mapping) -> dict:
    """What a ledger's first line says: the base model by digest, the concepts that may be erased, and the prompts that every shift
    protects beside the other concepts: the blank one, the watermarks and `also`. `source` is where the model is to be found."""
    return {"base": model.name, "base_digest": model.digest, "erase_cat": category, "concepts": [concept.index for concept in concepts],
            "protected": list(dict.fromkeys(["", *watermarks(), *also])), **source}


def make(ledger: Ledger, model: TextToImage, concepts: Sequence[Concept], method: str, given: Mapping,
         data: Path) -> dict[int, dict]:
    """The shifts that erase `concepts` by `method`, for `Ledger.append`: kept under the number of the next line, so that no file
    that a line names is ever written again. Each protects all that the ledger protects, and its other concepts. `seconds` and
    `peak_gib` are of all concepts together, the memory that of the whole process, or on a GPU of its tensors."""
    check_base(ledger.binding, model.digest, ledger.path)
    begin = time.perf_counter()
    store = Store(ledger.root / "shifts", method, model.name, ledger.binding["erase_cat"], 0, len(ledger.changes) + 1)
    if METHODS[method].null_space:
        own = settings(model.base).solution
        for _ in solve(model, store, concepts, ledger.binding["concepts"], own.tolerance, own.basis, own.templates, own.always,
                       also=ledger.binding["protected"]):
            pass
    make_shifts(model, store, concepts, given, data)
    spent = {"seconds": round(time.perf_counter() - begin, 1), "peak_gib": round(peak_memory() / 2**30, 2)}
    layers, seen, made = kv_layers(model.unet), model.seen(ledger.prompts), {}
    for concept in concepts:
        shift, entry = describe(ledger, store, concept)
        moved = leaks(layers, {"": shift}, {prompt: rows for prompt, rows in seen.items() if prompt != concept.prompt})
        inside = set(shift.names) <= {f"{name}.weight" for name in layers}  # otherwise keys and values do not say all
        made[concept.index] = entry | {"leak": max(row["leak"] for row in moved) if inside else None} | spent
    return made


def describe(ledger: Ledger, store: Store, concept: Concept) -> tuple[WeightShift, dict]:
    """A concept's shift of this time in `store`, which lies below the ledger's root, and what is known of it, for `Ledger.append`."""
    path = store.shift(concept.index)
    shift = WeightShift.load(path)
    return shift, {"concept": concept.name, "method": store.method, "shift": path.relative_to(ledger.root).as_posix(),
                   "rank": len(shift.directions) if isinstance(shift, SeparableShift) else None, "bytes": path.stat().st_size,
                   "steps": shift.recipe["steps"]}


def table(ledger: Ledger) -> pd.DataFrame:
    """A row for each concept: what it is and since when, and of the shift that is on, or was last: method, rank (directions), size
    in KB, steps, and the most that it moves any other prompt of the ledger (`leak`)."""
    on, rows = ledger.state(), []
    for concept in ledger.concepts:
        last = ledger.last_shift(concept.index) or {}
        rows.append({"index": concept.index, "concept": concept.name, "since": ledger.since(concept.index),
                     "state": "erased" if concept.index in on else "restored" if last else "untouched",
                     "method": last.get("method", ""), "rank": last.get("rank") or "", "KB": last["bytes"] // 1000 if last else "",
                     "steps": last.get("steps", ""), "leak on others": last.get("leak") or ""})
    return pd.DataFrame(rows)


def verify(ledger: Ledger, model: TextToImage) -> pd.DataFrame:
    """A row for each thing proved: the history's chain of digests (as it was read), the base model's digest, that of each shift that
    was ever on, and that all shifts of the present state go on and off again and leave the very bits of the base.

    Raises ValueError, naming what is wrong, for the first that fails."""
    rows = [{"what": "history", "digest": ledger.head[:12], "proved": f"{len(ledger.changes)} changes, none altered or missing"}]
    check_base(ledger.binding, model.digest, ledger.path)
    rows.append({"what": f"base {ledger.binding['base']}", "digest": model.digest[:12], "proved": "the model that the ledger was begun with"})
    loaded = {}
    for change in ledger.changes:
        for index, entry in change.erase.items():
            if entry["digest"] not in loaded:
                loaded[entry["digest"]] = shift = ledger.load(entry)
                shift.check(model.digest, model.unet)
                rows.append({"what": entry["shift"], "digest": entry["digest"][:12], "proved": f"erases {entry['concept']} from that base"})
    before = bits(model.unet)
    with applied(model.unet, [loaded[entry["digest"]] for entry in ledger.state().values()]):
        merged = bits(model.unet)
    if bits(model.unet) != before:
        raise ValueError("the weights without shifts are not the base model's: this is a fault of the program, report it")
    rows.append({"what": f"{len(ledger.state())} shifts merged", "digest": merged[:12], "proved": "the present weights, from the history alone"})
    rows.append({"what": "no shift", "digest": before[:12], "proved": "the base model, bit for bit"})
    return pd.DataFrame(rows)


def peak_memory() -> int:
    """The most bytes that this process has held so far: its tensors on a GPU if it has used one, else all of it (Linux' count)."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    try:
        import resource
    except ImportError:  # Windows, where psutil knows
        return psutil.Process().memory_info().peak_wset
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def bits(unet: nn.Module) -> str:
    """SHA-256 of the names and bits of all weights."""
    digest = hashlib.sha256()
    for name, weight in sorted(unet.state_dict().items()):
        digest.update(name.encode())
        digest.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@contextmanager
def locked(root: Path) -> Iterator[None]:
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
