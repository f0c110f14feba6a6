"""Atomic writes of files and folders, the metadata file of a folder, and digests of files."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

import psutil

from ldm.io.errors import notify
from ldm.io.legacy import ADDED_KEYS, upgrade, upgrade_digests

METADATA_FILE = "metadata.json"  # in a folder: what made it
SETTINGS_FILE = "srs-me.yaml"  # in a model's folder: its settings, which its user may change or add
_OLD_METADATA_FILE = "recipe.json"


def _set_default_permissions(path: Path) -> None:
    """Give a file the permissions of any new one: tempfile and safetensors make theirs for the owner alone."""
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)


_PARTIAL = ".partial-"  # then the host's name, @, the writer's process number, and what tells apart
_OLD = "old-"  # in a half-written folder, before its name: the one that it was about to replace


@cache
def _remove_stale_partials(folder: Path) -> None:
    """Remove what processes of this machine that were killed left half written in `folder`; once for each process.

    A folder that was just being replaced comes back.
    """
    own_prefix = f"{_PARTIAL}{socket.gethostname()}@"  # which no host's name has
    for left in folder.glob(f"{own_prefix}*"):
        writer = left.name.removeprefix(own_prefix).split("-")[0]
        if not writer.isdigit() or psutil.pid_exists(int(writer)):
            continue
        if not left.is_dir() or left.is_symlink():
            left.unlink(missing_ok=True)
            continue
        for old in left.glob(f"{_OLD}*"):
            _restore(old, folder / old.name.removeprefix(_OLD))
        shutil.rmtree(left, ignore_errors=True)  # as another process may be doing, too


def _restore(old: Path, path: Path) -> None:
    """Put a folder back where it was, if nothing has taken its place."""
    if not path.exists():
        with suppress(OSError):
            old.rename(path)


def _prepare(path: Path) -> str:
    """Make the folder of `path`, and return how the name of what is half written there begins."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_stale_partials(path.parent.resolve())
    return f"{_PARTIAL}{socket.gethostname()}@{os.getpid()}-"


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
    """Like `atomic_write` for a folder, which replaces an older one at `path` only when the block has ended well.

    Of a process that is killed just between the two the next one that writes there puts the older one back.
    """
    path = Path(path)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=_prepare(path)) as partial:
        new, old = Path(partial) / "new", Path(partial) / f"{_OLD}{path.name}"
        new.mkdir()
        yield new
        for part in new.rglob("*"):
            if part.is_file():
                _set_default_permissions(part)
        if path.exists():
            path.rename(old)
        try:
            new.rename(path)
        except OSError:
            _restore(old, path)
            raise


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path`, whole or not at all."""
    with atomic_write(path) as partial:
        partial.write_text(text, encoding="utf-8", newline="\n")


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
    if path is None:
        return {}
    try:
        content = upgrade(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON: remove the folder, or get it back from a copy") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is not a mapping")
    return content


def check_metadata(folder: Path, metadata: dict[str, Any], digests: Sequence[str] = ()) -> None:
    """Raise ValueError when `folder` holds what was made from other metadata.

    `digests` are those of the base model, today's first: an older version's counts as today's. So does metadata of an
    older version that has no digests of contents, with a notice.
    """
    path = find_metadata_file(folder)
    if not path:
        return
    existing, expected = read_dir_metadata(folder), json.loads(json.dumps(metadata))
    differing = _differing_keys(upgrade_digests(expected, digests), upgrade_digests(existing, digests))
    if differing:
        words = ["shifts" if key == "merged" else key for key in differing]
        raise ValueError(
            f"{folder} holds what another run made, with other {', '.join(words)} (see {path.name} there): choose "
            "another `save_path`, or remove the folder"
        )
    if not is_same(existing, expected):  # it lacks what is left out above, or has an older digest
        notify(f"{folder} was made by an older version, which did not write down all that decides what is in it")


def is_same(expected: Any, existing: Any) -> bool:
    """Return whether JSON values say the same, at any depth, whatever program wrote them.

    What is expected may say things that `existing`, of an older version, does not: `ADDED_KEYS`.
    """
    if isinstance(expected, list) and isinstance(existing, list):
        return len(expected) == len(existing) and all(map(is_same, expected, existing))
    if not isinstance(expected, dict) or not isinstance(existing, dict):
        return expected == existing
    return not _differing_keys(expected, existing)


def _differing_keys(expected: Mapping[str, Any], existing: Mapping[str, Any]) -> list[str]:
    """Return the keys of two JSON objects under which they do not say the same, as `is_same` has it."""
    left_out = {"created_by", "files", *(key for key in ADDED_KEYS if key not in existing)}
    keys = [key for key in dict.fromkeys([*expected, *existing]) if key not in left_out]
    both = {key for key in keys if key in expected and key in existing}
    return [key for key in keys if key not in both or not is_same(expected[key], existing[key])]


def write_dir_metadata(folder: Path, metadata: dict[str, Any]) -> None:
    """Write a folder's metadata, with the digests of all files in it, by which `is_written` knows them again."""
    files = {part.relative_to(folder).as_posix(): stream_digest(part) for part in _files(folder)}
    write_json(folder / METADATA_FILE, metadata | {"files": files})


def is_written(folder: Path, metadata: dict[str, Any], digests: Sequence[str] = ()) -> bool:
    """Return whether `folder` holds what was made from `metadata`, every file as `write_dir_metadata` found it.

    False says that it is to be written: the folder is missing, empty, or holds nothing but such files, some damaged.
    Raises ValueError for a folder that holds anything else. `digests` are those of `check_metadata`.
    """
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise ValueError(f"{folder} is a link, or a file and no folder: choose another `save_path`, or remove it")
    present = {part.relative_to(folder).as_posix() for part in _files(folder)}
    if present and find_metadata_file(folder) is None:
        raise ValueError(f"{folder} holds files that no run made: choose another `save_path`, or remove the folder")
    check_metadata(folder, metadata, digests)
    if not present:
        return False
    files = read_dir_metadata(folder).get("files")
    if files is None:
        notify(f"{folder} was written by an older version, without digests of its files: if they are intact is unknown")
        return True
    damaged = changed_files(folder)
    if damaged and present <= set(files):
        notify(f"{folder} is not as it was written ({damaged[0]}): it is written again")
    elif damaged:
        foreign = min(present - set(files))
        raise ValueError(
            f"{folder} is not as it was written ({damaged[0]}), and {foreign} there is not this program's: "
            "choose another `save_path`, or remove the folder"
        )
    return not damaged


def changed_files(folder: Path) -> list[str]:
    """Return the files of a folder that are missing or not as its metadata says, by their relative paths.

    Empty for a folder of an older version, which has no such digests. Raises ValueError for metadata that is none.
    """
    files = read_dir_metadata(folder).get("files", {})
    if not isinstance(files, dict):
        raise ValueError(f"{find_metadata_file(folder)} lists no files with their digests: write the folder again")
    known = {part.relative_to(folder).as_posix(): part for part in _files(folder)}
    return sorted(name for name, digest in files.items() if name not in known or stream_digest(known[name]) != digest)


def is_damaged(path: Path) -> bool:
    """Return whether a file is another than the metadata of its folder says; False where that says nothing of it."""
    try:
        files = read_dir_metadata(path.parent).get("files")
    except (ValueError, OSError):  # a file of another program that is called so
        return False
    return isinstance(files, dict) and path.name in files and stream_digest(path) != files[path.name]


def unlisted_files(folder: Path) -> list[str]:
    """Return the files below a folder's own folders that its metadata does not list, by their relative paths.

    Empty for a folder of an older version, which has no such list.
    """
    files = read_dir_metadata(folder).get("files")
    if files is None:
        return []
    found = (part.relative_to(folder) for part in _files(folder))
    return [path.as_posix() for path in found if len(path.parts) > 1 and path.as_posix() not in files]


def _files(folder: Path) -> list[Path]:
    """Return the files below a folder but its metadata's and its settings', in order."""
    others = {folder / METADATA_FILE, folder / _OLD_METADATA_FILE, folder / SETTINGS_FILE}
    return sorted(part for part in folder.rglob("*") if part.is_file() and part not in others)


def check_writable(path: Path, setting: str) -> None:
    """Raise ValueError, with the setting that gives it, for a path at which nothing can be written."""
    there = next(parent for parent in (path, *path.absolute().parents) if parent.is_dir())
    if not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"`{setting}` {path}: nothing can be written in {there}: give another place")


def stream_digest(path: Path) -> str:
    """Return the SHA-256 of a file's bytes."""
    with open(path, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def published_digest(path: Path) -> str | None:
    """Return the digest of a file that `SHA256SUMS` beside it names, in sha256sum's format; None where it does not."""
    sums = path.with_name("SHA256SUMS")
    if not sums.is_file():
        return None
    for line in sums.read_text(encoding="utf-8").splitlines():
        digest, _, name = line.partition("  ")
        if name == path.name:
            return digest
    return None


def file_digest(path: Path) -> str:
    """SHA-256 of a file, or of all files of a folder with their relative names."""
    path, digest = Path(path), hashlib.sha256()
    for part in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if part.is_file():
            digest.update(part.relative_to(path).as_posix().encode())
            digest.update(bytes.fromhex(stream_digest(part)))
    return digest.hexdigest()
