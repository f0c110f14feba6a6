"""Atomic writes of files and folders, the metadata file of a folder, and digests of files."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import psutil

from ldm.io.legacy import upgrade

METADATA_FILE = "metadata.json"  # in a folder: what made it
_OLD_METADATA_FILE = "recipe.json"


def _set_default_permissions(path: Path) -> None:
    """Give a file the permissions of any new one: tempfile and safetensors make theirs for the owner alone."""
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)


_PARTIAL = ".partial-"  # then the host's name, the writer's process number, and what tells apart


@cache
def _remove_stale_partials(folder: Path) -> None:
    """Remove what processes of this machine that were killed left half written in `folder`; once for each process."""
    own_prefix = f"{_PARTIAL}{socket.gethostname()}-"
    for left in folder.glob(f"{own_prefix}*"):
        writer = left.name.removeprefix(own_prefix).split("-")[0]
        if writer.isdigit() and not psutil.pid_exists(int(writer)):
            shutil.rmtree(left) if left.is_dir() else left.unlink(missing_ok=True)


def _prepare(path: Path) -> str:
    """Make the folder of `path`, and return how the name of what is half written there begins."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_stale_partials(path.parent.resolve())
    return f"{_PARTIAL}{socket.gethostname()}-{os.getpid()}-"


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, which becomes `path` when the block ends well and vanishes otherwise; what a
    killed process leaves vanishes when the next one writes there.
    """
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
    """Like `atomic_write` for a folder, which replaces an older one at `path` only when the block has ended well."""
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


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write `content` to `path` as JSON, whole or not at all."""
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def find_metadata_file(folder: Path) -> Path | None:
    """Return the path of a folder's metadata file, under today's or its older name; None where there is none."""
    for name in (METADATA_FILE, _OLD_METADATA_FILE):
        if (folder / name).is_file():
            return folder / name
    return None


def read_dir_metadata(folder: Path) -> dict[str, Any]:
    """Return what a folder's metadata file says, with today's keys; empty where there is none.

    Raises ValueError when the file is not JSON, or no mapping.
    """
    path = find_metadata_file(folder)
    content = upgrade(json.loads(path.read_text())) if path else {}
    if not isinstance(content, dict):
        raise ValueError(f"{path} is not a mapping")
    return content


def check_metadata(folder: Path, metadata: dict[str, Any]) -> None:
    """Raise ValueError when `folder` holds what was made from other metadata."""
    path = find_metadata_file(folder)
    expected = json.loads(json.dumps(metadata))
    if path and _without_creator(read_dir_metadata(folder)) != _without_creator(expected):
        raise ValueError(
            f"{folder} holds what another run made (see {path.name} there): choose another `save_path`, or "
            "remove the folder"
        )


def _without_creator(value: Any) -> Any:
    """Return a JSON value without the names of the programs that made it, at any depth."""
    if isinstance(value, list):
        return [_without_creator(item) for item in value]
    if isinstance(value, dict):
        return {key: _without_creator(item) for key, item in value.items() if key != "created_by"}
    return value


def file_digest(path: Path) -> str:
    """SHA-256 of a file, or of all files of a folder with their relative names."""
    path, digest = Path(path), hashlib.sha256()
    for part in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if part.is_file():
            digest.update(part.relative_to(path).as_posix().encode())
            with open(part, "rb") as opened:
                digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()
