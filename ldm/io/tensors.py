"""Tensors in safetensors files whose header says what they are, opened without running code, and their digests.

The header holds the digest of all that the file says, which is checked whenever it is read.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ldm.io.errors import notify
from ldm.io.files import atomic_write, published_digest, stream_digest, write_text
from ldm.io.legacy import upgrade

METADATA_KEY = "srs-me"
CREATED_BY = "srs-me"  # the program, in metadata
_BESIDE = ".json"  # of the file that has what is too long for a header


def library_versions() -> dict[str, str]:
    """Return the versions of the libraries that metadata names."""
    return {name: _version(name) for name in ("torch", "diffusers", "transformers")}


_version = cache(version)  # which reads a file of the package


def save_tensors(
    path: Path,
    tensors: Mapping[str, torch.Tensor],
    file_type: str,
    metadata: dict[str, Any],
    beside: Mapping[str, Any] | None = None,
) -> None:
    """Write safetensors whose header says what the file is (`file_type`) and what made it (`metadata`).

    Metadata that are too long for a header go `beside` it, into a JSON file of the same name whose digest the header
    says. The same content gives the same bytes: all of the header is one entry, as several would be written in random
    order. Raises ValueError for a tensor with NaN or infinity, before anything is written.
    """
    if beside is not None:
        text = json.dumps(beside, indent=1, ensure_ascii=False) + "\n"
        write_text(Path(path).with_suffix(_BESIDE), text)
        metadata = metadata | {"beside": hashlib.sha256(text.encode()).hexdigest()}
    contents = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    check_finite(contents, f"the {file_type} {path}")
    metadata = json.loads(json.dumps(metadata))  # as it will be read
    digest = _content_digest(file_type, metadata, sorted(contents.items()))
    header = json.dumps({"file_type": file_type, "metadata": metadata, "content_digest": digest}, sort_keys=True)
    with atomic_write(Path(path)) as partial, named_writes(Path(path)):
        save_file(contents, partial, metadata={METADATA_KEY: header})


@contextmanager
def named_writes(path: Path) -> Iterator[None]:
    """Let torch and safetensors, whose errors do not name a file that cannot be written, raise one that does."""
    try:
        yield
    except (RuntimeError, SafetensorError) as error:
        raise OSError(f"{path.name} cannot be written, as where a disk is full: {error}") from error


def not_finite(tensors: Mapping[str, torch.Tensor]) -> str | None:
    """Return the name of the first tensor that holds NaN or infinity; None where all are finite."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            return name
    return None


def check_finite(tensors: Mapping[str, torch.Tensor], what: str) -> None:
    """Raise ValueError, naming the tensor, when `what` cannot be written since one of its tensors is not finite."""
    name = not_finite(tensors)
    if name is None:
        return
    if tensors[name].dtype == torch.float16:
        advice = "it does not fit into float16, so choose `save_dtype` bfloat16 or float32"
    else:
        advice = "a setting or an input is too large or too small for these numbers"
    raise ValueError(f"{what} is not written: {name} would hold NaN or infinity: {advice}")


def _content_digest(file_type: str, metadata: Any, tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """Return the SHA-256 of a file's type and metadata, and of its tensors' names, types, shapes and bits, in order."""
    digest = hashlib.sha256(json.dumps([file_type, metadata], sort_keys=True).encode())
    for name, tensor in tensors:
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


_FileState = tuple[int, int, int]


def _file_state(path: Path) -> _FileState | None:
    """Return what tells a file from another one of the same path: its number, size and time; None where none is."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


def _stored_digest(path: Path) -> str | None:
    """Return the digest of its contents that a file's header says; None where there is none."""
    try:
        with safe_open(path, framework="pt") as opened:
            return json.loads((opened.metadata() or {})[METADATA_KEY]).get("content_digest")
    except (SafetensorError, OSError, ValueError, KeyError, AttributeError, RecursionError):
        return None


@dataclass(frozen=True)
class LazyTensors(Mapping[str, torch.Tensor]):
    """Tensors of a safetensors file by other names (`names`: name -> that in the file), each read when it is asked for,
    so that many files together take little memory. Raises ValueError where the file has been written anew since.
    """

    path: Path
    names: Mapping[str, str]
    content_digest: str = ""  # of all that the file says
    state: _FileState | None = None  # of the file when its header was read; None where it does not matter

    def __getitem__(self, name: str) -> torch.Tensor:
        try:
            with safe_open(self.path, framework="pt", backend="pread") as opened:
                return opened.get_tensor(self.names[name])
        finally:  # after it was opened, and also where another file has no such tensor
            self._check_same_file()

    def _check_same_file(self) -> None:
        """Raise ValueError where the path leads to another file now, with other contents."""
        if self.state is None or _file_state(self.path) == self.state:
            return
        if _stored_digest(self.path) != self.content_digest:
            raise ValueError(
                f"{self.path} was written anew, or removed, since it was read: load it again, and keep what is made "
                "from other inputs in another `artifacts_dir`"
            )

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def where(self, keeps: Callable[[str], bool]) -> LazyTensors:
        """Those whose names `keeps` is true of."""
        return replace(self, names={name: own for name, own in self.names.items() if keeps(name)})

    def with_prefix(self, prefix: str) -> LazyTensors:
        """Those whose names start with `prefix`, without it."""
        found = {name.removeprefix(prefix): own for name, own in self.names.items() if name.startswith(prefix)}
        return replace(self, names=found)


def load_tensors(
    path: Path, file_type: str, hint: str = "", checked: bool = False
) -> tuple[LazyTensors, dict[str, Any]]:
    """Return the tensors, each read when it is asked for, and the metadata of a file that `save_tensors` wrote.

    A file of an older version has no digest of its contents: it is accepted with a notice, but where `SHA256SUMS`
    beside it says what its bytes are, or the caller has `checked` them. Raises ValueError if the file is missing
    (`hint`: what to give instead), of another type, damaged, or has NaN or infinity.
    """
    path = Path(path)
    state = _file_state(path)  # of before, so that a file that is written meanwhile is seen
    header, names = _read_header(path, file_type, hint)
    tensors = LazyTensors(path, {name: name for name in names})
    try:
        digest = _content_digest(header.file_type, header.written_metadata, _finite_items(tensors))
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged or not safetensors: make it again") from error
    if header.content_digest is None:
        if not checked:
            _check_older_file(path, file_type)
    elif header.content_digest != digest:
        raise ValueError(f"{path} is not as it was written (its contents have another digest): make it again")
    return LazyTensors(path, tensors.names, digest, state), _with_beside(path, header.metadata)


def _with_beside(path: Path, metadata: dict[str, Any]) -> dict[str, Any]:
    """Return the metadata of a file's header with those beside it, if they are there.

    Raises ValueError where these are not those that were written with the file.
    """
    beside = path.with_suffix(_BESIDE)
    if "beside" not in metadata or not beside.is_file():
        return metadata
    content = beside.read_bytes()
    if hashlib.sha256(content).hexdigest() != metadata["beside"]:
        raise ValueError(f"{beside} is not what was written beside {path.name}: get both again, or remove the former")
    try:
        said = json.loads(content)
    except (ValueError, RecursionError):
        said = None
    if not isinstance(said, dict):
        raise ValueError(f"{beside} holds no metadata: get it and {path.name} again, or remove it")
    return said | metadata


def _finite_items(tensors: LazyTensors) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors in order of their names, each read once. Raises ValueError for one with NaN or infinity."""
    for name in sorted(tensors):
        tensor = tensors[name]
        if not_finite({name: tensor}) is not None:
            raise ValueError(f"{tensors.path}: {name} holds NaN or infinity: make the file again")
        yield name, tensor


def _check_older_file(path: Path, file_type: str) -> None:
    """Check a file without a digest of its own against `SHA256SUMS` beside it, or say that it cannot be checked."""
    published = published_digest(path)
    if published is None:
        notify(
            f"{path}, a {file_type} of an older version, has no digest of its contents: whether it is intact is unknown"
        )
    elif published != stream_digest(path):
        raise ValueError(f"{path} is not the file that SHA256SUMS beside it names: get it again")


@dataclass(frozen=True)
class _Header:
    """What a file's header says: its type, its metadata by today's keys and as written, and the digest of it all."""

    file_type: str
    metadata: dict[str, Any]
    written_metadata: Any
    content_digest: Any


def _read_header(path: Path, file_type: str, hint: str) -> tuple[_Header, list[str]]:
    advice = f": {hint}" if hint else ""
    if not path.is_file():
        raise ValueError(f"no {file_type} {path}{advice}")
    try:
        with safe_open(path, framework="pt") as opened:
            written = json.loads((opened.metadata() or {}).get(METADATA_KEY, "{}"))
            names = list(opened.keys())
        header = upgrade(written)
    except (SafetensorError, ValueError, OSError, RecursionError) as error:
        raise ValueError(f"{path} is damaged or not safetensors: make it again") from error
    header = header if isinstance(header, dict) else {}
    if header.get("file_type") != file_type or not isinstance(header.get("metadata"), dict):
        found = str(header.get("file_type", "file of another program"))[:100]
        raise ValueError(f"{path} is not a {file_type} but a {found}{advice}")
    if not header.keys() <= {"file_type", "metadata", "content_digest"}:
        raise ValueError(f"{path} is not as it was written (its header has other keys): make it again")
    return _Header(file_type, header["metadata"], written.get("metadata"), header.get("content_digest")), names


def read_metadata(path: Path, file_type: str) -> dict[str, Any]:
    """Return the metadata of a file that `save_tensors` wrote; empty when there is no such file or it is damaged."""
    try:
        return load_tensors(path, file_type)[1]
    except ValueError:
        return {}


class EmbeddingModel(Protocol):
    """What a file is made for: a whole model, or what turns its prompts into embeddings of `context_dim` numbers."""

    name: str

    @property
    def digests(self) -> Sequence[str]:
        """The digests of the whole model, today's first; none of text encoders alone."""
        ...

    @property
    def text_digest(self) -> str:
        """The digest of its tokenizers and text encoders."""
        ...

    @property
    def context_dim(self) -> int: ...


def check_base_model(metadata: Mapping[str, Any], model: EmbeddingModel, path: Path | str) -> None:
    """Raise ValueError unless a file's metadata says that it was made for this base model, or for its text encoder.

    A file that names its text encoder by `text_digest` is for every model that has that one. One that knows its base
    model by a digest of an older version is accepted, with a notice.
    """
    made_for, name = metadata.get("base_digest"), metadata.get("base_model", "unknown")
    if "text_digest" in metadata:
        made_for, expected = metadata["text_digest"], model.text_digest
        if made_for != expected:
            raise ValueError(
                f"{path} was made for another text encoder (that of {name}, digest {str(made_for)[:14]}, not "
                f"{expected[:14]}): pass `model` one that has it, or make it again"
            )
        kind, own = metadata.get("hidden_states"), getattr(model, "kind", None)
        if kind is not None and own not in (None, kind):
            raise ValueError(
                f"{path} was made for the {kind} of a text encoder, and {model.name} takes the {own}: make it again"
            )
    elif made_for in model.digests[1:]:
        notify(f"{path} knows its base model by a digest of an older version, which leaves the tokenizer out")
    elif made_for not in model.digests[:1]:
        expected = model.digests[0][:14] if model.digests else "a text encoder alone"
        raise ValueError(
            f"{path} was made for another base model ({name}, digest {str(made_for)[:14]}, not {expected}): pass "
            "`model` that one, or make it again"
        )


def tensor_digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 over names, shapes and values in half precision, so that a model and its fp16 copy are one base."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu()
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(tensor.to(torch.float16).contiguous().numpy().tobytes())
    return digest.hexdigest()
