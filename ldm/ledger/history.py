"""The file of a ledger's history: its lock, and the repair of a torn last line."""

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
