"""The file of a ledger's history: its lock, the repair of a torn last line, and the migration of an older version."""

from __future__ import annotations

import errno
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from ldm.io.checks import is_json
from ldm.io.files import atomic_write
from ldm.ledger.ledger import Ledger
from ldm.ledger.lines import VERSION, format_entry, write_line

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # what a file system without locks says


@contextmanager
def ledger_lock(root: Path) -> Iterator[None]:
    """While the block runs, let no other process change the ledger at `root`; say so when it has to wait."""
    Path(root).mkdir(parents=True, exist_ok=True)
    lock = FileLock(Path(root) / ".lock", fallback_to_soft=False)  # a soft lock outlives a process that was killed
    try:
        try:
            lock.acquire(timeout=0)
        except Timeout:
            print(f"another process is changing {root}: waiting for it", flush=True)
            lock.acquire()
    except (OSError, NotImplementedError) as error:
        if isinstance(error, OSError) and error.errno not in _NO_LOCKS:
            raise
        raise ValueError(
            f"{root} cannot be locked ({error}): put the ledger on a file system that locks files"
        ) from error
    try:
        yield
    finally:
        lock.release()


def repair(path: Path) -> tuple[Path, int] | None:
    """Cut a torn last line off the history at `path`; return the file beside it that holds the line, and its bytes.

    None where nothing is torn. The caller holds `ledger_lock`. Raises ValueError when more than the last line is
    damaged, or when the last line is whole and says what was not written there.
    """
    content = path.read_bytes()
    with suppress(ValueError):
        Ledger(path)
        return None
    start = content.rstrip(b"\n").rfind(b"\n") + 1
    kept, torn = content[:start], content[start:]
    try:
        Ledger.from_text(path, kept.decode("utf-8"))
    except ValueError as error:
        raise ValueError(f"more than the last line of {path} is damaged: get the file back from a copy") from error
    if is_json(torn):
        raise ValueError(f"the last line of {path} is not torn but altered: get the file back from a copy")
    cut_off = path.with_name(f"{path.name}.torn-{hashlib.sha256(torn).hexdigest()[:8]}")
    for target, part in ((cut_off, torn), (path, kept)):
        with atomic_write(target) as partial:
            partial.write_bytes(part)
    return cut_off, len(torn)


def migrate(path: Path) -> Path:
    """Write the history at `path`, of an older version, as one of today's; return where the old file is kept.

    The new first line holds the concepts whole, as their category's list has them now, and the digest of the old file;
    all else says what it said, by labels, in a chain of digests of its own. The shifts stay the same files. The caller
    holds `ledger_lock`. Raises ValueError for a history of today's version.
    """
    ledger, content = Ledger(path), path.read_bytes()
    if ledger.version == VERSION:
        raise ValueError(f"{path} is of today's version already: there is nothing to migrate")
    sha256 = hashlib.sha256(content).hexdigest()
    kept = path.with_name(f"{path.name}.v{ledger.version}-{sha256[:8]}")
    concepts = [concept.to_dict() for concept in ledger.concepts]
    migrated = {"version": VERSION, "concepts": concepts, "migrated_from": {"file": kept.name, "sha256": sha256}}
    text = write_line(ledger.header | migrated)
    prev_hash = hashlib.sha256(text.rstrip("\n").encode()).hexdigest()
    for entry in ledger.entries:
        line = format_entry(entry, prev_hash, VERSION)
        prev_hash = hashlib.sha256(line.rstrip("\n").encode()).hexdigest()
        text += line
    Ledger.from_text(path, text)  # before anything is written
    for target, part in ((kept, content), (path, text.encode())):
        with atomic_write(target) as partial:
            partial.write_bytes(part)
    return kept
