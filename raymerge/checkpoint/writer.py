"""Write one safetensors file while its tensors are computed: known layout, temp name, fsync, rename.

On object storage (upload.py) a file appears when its upload ends.
"""

import errno
import os
import uuid
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from raymerge.checkpoint.header import Layout, build_header
from raymerge.checkpoint.place import OutputPath, RemotePath
from raymerge.checkpoint.upload import open_upload
from raymerge.errors import StorageError

TEMPORARY = ".tmp"


class ShardWriter:
    """An open file whose layout is known; entries are written range by range."""

    def __init__(self, handle: int, starts: dict[str, int]) -> None:
        self._handle = handle
        self._starts = starts
        self.bytes_written = 0

    def write(self, name: str, first: int, entries: Tensor) -> None:
        """Write flat `entries` of tensor `name` from entry `first` on, in the dtype given at the start."""
        flat = entries.flatten()
        if not flat.numel():
            return
        offset = self._starts[name] + first * flat.element_size()
        buffer = flat.contiguous().view(torch.uint8).numpy().data
        done = 0
        while done < len(buffer):
            done += os.pwrite(self._handle, buffer[done:], offset + done)
        self.bytes_written += done


class TensorWriter(Protocol):
    """Takes entries of tensors, range by range and in order."""

    bytes_written: int

    def write(self, name: str, first: int, entries: Tensor) -> None:
        """Write flat `entries` of tensor `name` from entry `first` on, in the dtype given at the start."""
        ...


def open_shard(path: OutputPath, tensors: Layout) -> AbstractContextManager[TensorWriter]:
    """Write a safetensors file of these tensors, in this order; it appears under its name when it is whole.

    Raises StorageError.
    """
    return open_upload(path, tensors) if isinstance(path, RemotePath) else _open_file(path, tensors)


@contextmanager
def _open_file(path: Path, tensors: Layout) -> Iterator[ShardWriter]:
    """Space is reserved first, so a full disk is found before work is done."""
    header, entries = build_header(tensors)
    size = len(header) + sum(entry.num_bytes for entry in entries)
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}{TEMPORARY}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        try:
            os.posix_fallocate(handle, 0, size)
            os.pwrite(handle, header, 0)
            yield ShardWriter(handle, {entry.name: entry.start for entry in entries})
            os.fsync(handle)
        finally:
            os.close(handle)
        os.rename(temporary, path)
        sync_folder(path.parent)
    except OSError as problem:
        _discard(temporary)
        raise _cannot_write(path, problem, f"{size} bytes are needed; ") from None
    except BaseException:
        _discard(temporary)
        raise


def write_tensors(path: OutputPath, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file of tensors that are there, on any device. Raises StorageError."""
    layout = [(name, value.dtype, tuple(value.shape)) for name, value in tensors.items()]
    with open_shard(path, layout) as writer:
        for name, value in tensors.items():
            writer.write(name, 0, value.detach().cpu())


def write_text(path: OutputPath, text: str) -> None:
    """Write a small file whole. Raises StorageError."""
    if isinstance(path, RemotePath):
        path.write_bytes(text.encode())
        return
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name to write a file under, which then is fsynced and renamed. Raises StorageError."""
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}{TEMPORARY}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        handle = os.open(temporary, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
        os.rename(temporary, path)
    except OSError as problem:
        _discard(temporary)
        raise _cannot_write(path, problem) from None


def _cannot_write(path: Path, problem: OSError, needed: str = "") -> StorageError:
    full = problem.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    advice = f"{needed}free some space and run the same command again" if full else "check the disk"
    return StorageError(f"{path}: cannot be written: {problem.strerror}; {advice}")


def _discard(temporary: Path) -> None:
    """Remove what is left of a failed write; what made it fail is what the user should hear of."""
    with suppress(OSError):
        temporary.unlink()


def sync_folder(folder: Path) -> None:
    """Put a folder's own entries on the disk, so that renames in it survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
