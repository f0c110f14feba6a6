"""TODO io.files."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
import hashlib
import json
import os
from pathlib import Path
import psutil
import shutil
import socket
import tempfile


METADATA_FILE = "recipe.json"  # in a folder: what made it


def _set_default_permissions(path: Path) -> None:
    """Give a file the permissions of any new one: tempfile and safetensors make theirs for the owner alone."""
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)


_PARTIAL = ".partial-"  # then the host's name, the writer's process number, and what tells apart


@cache
def _remove_stale_partials(folder: Path) -> None:
    """Remove what processes of this machine that were killed left half written in `folder`; once for each process."""
    mine = f"{_PARTIAL}{socket.gethostname()}-"
    for left in folder.glob(f"{mine}*"):
        writer = left.name.removeprefix(mine).split("-")[0]
        if writer.isdigit() and not psutil.pid_exists(int(writer)):
            shutil.rmtree(left) if left.is_dir() else left.unlink(missing_ok=True)


def _prepare(path: Path) -> str:
    """Make the folder of `path`, and return how the name of what is half written there begins."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_stale_partials(path.parent.resolve())
    return f"{_PARTIAL}{socket.gethostname()}-{os.getpid()}-"


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, which becomes `path` when the block ends well and vanishes otherwise; what a killed
    process leaves vanishes when the next one writes there."""
    path = Path(path)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=_prepare(path), suffix=path.suffix)
    os.close(handle)
    partial = Path(name)
    try:
        yield partial
        _set_default_permissions(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def atomic_write_dir(path: Path) -> Iterator[Path]:
    """Like `atomic` for a folder, which replaces an older one at `path` only when the block has ended well."""
    path = Path(path)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=_prepare(path)) as partial:
        new, old = Path(partial) / "new", Path(partial) / "old"
        new.mkdir()
        yield new
        for part in new.rglob("*"):
            if part.is_file():
                _set_default_permissions(part)
        if path.exists():
            path.rename(old)
        new.rename(path)


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path`, whole or not at all."""
    with atomic_write(path) as partial:
        partial.write_text(text)


def write_json(path: Path, content: dict) -> None:
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def check_metadata(folder: Path, recipe: dict) -> None:
    """Raises ValueError when `folder` holds what another recipe made."""
    path = folder / METADATA_FILE
    if path.exists() and json.loads(path.read_text()) != json.loads(json.dumps(recipe)):
        raise ValueError(f"{folder} holds what another run made (see {path.name} there): "
                         "choose another --save_path, or remove the folder")


def file_digest(path: Path) -> str:
    """SHA-256 of a file, or of all files of a folder with their relative names."""
    path, digest = Path(path), hashlib.sha256()
    for part in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if part.is_file():
            digest.update(part.relative_to(path).as_posix().encode())
            with open(part, "rb") as opened:
                digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()
