"""Read ranges of tensors into memory: no memory maps, so a process holds what it asked for and no more."""

import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from math import prod

import torch
from torch import Tensor

from raymerge.checkpoint.header import DTYPES
from raymerge.checkpoint.location import Location
from raymerge.checkpoint.ranges import StreamedFile
from raymerge.errors import CheckpointError, StorageError

# The largest exponent means infinity or NaN: sign-less bits at or above this, by dtype.
_NON_FINITE = {
    torch.float16: (torch.int16, 0x7FFF, 0x7C00),
    torch.bfloat16: (torch.int16, 0x7FFF, 0x7F80),
    torch.float32: (torch.int32, 0x7FFFFFFF, 0x7F800000),
    torch.float64: (torch.int64, 0x7FFFFFFFFFFFFFFF, 0x7FF0000000000000),
}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where one tensor lies: number of the model, file, first byte, safetensors dtype name and shape."""

    model: int
    file: str
    name: str
    start: int
    dtype: str
    shape: tuple[int, ...]

    @property
    def end(self) -> int:
        """The first byte after it."""
        return self.start + prod(self.shape) * DTYPES[self.dtype].itemsize


class Reader:
    """The open files of some checkpoints, numbered as `StoredTensor.model` says; for one thread."""

    def __init__(self, locations: Sequence[Location]) -> None:
        self._locations = locations
        self._files: dict[tuple[int, str], int] = {}
        # One of each model: what has been read ahead is held.
        self._remote: dict[int, StreamedFile] = {}
        self._pool: ThreadPoolExecutor | None = None
        self.bytes_read = 0

    def expect(self, tensors: Iterable[StoredTensor]) -> None:
        """Begin to fetch tensors, one of each model, that are read next, from their first entries on."""
        for tensor in tensors:
            if self._locations[tensor.model].is_remote and tensor.end > tensor.start:
                self._open_remote(tensor).expect(tensor.start, tensor.end)

    def read(self, tensor: StoredTensor, first: int, count: int) -> Tensor:
        """`count` entries of a tensor from entry `first` on, flat, in the stored dtype.

        Raises StorageError if the file cannot be read.
        """
        dtype = DTYPES[tensor.dtype]
        entries = torch.empty(count, dtype=dtype)
        if count:
            self._fill(entries, tensor, tensor.start + first * dtype.itemsize)
        return entries

    def where(self, tensor: StoredTensor) -> str:
        """File and name of a tensor, for messages."""
        return f"{self._locations[tensor.model]}/{tensor.file}: {tensor.name}"

    def _fill(self, entries: Tensor, tensor: StoredTensor, offset: int) -> None:
        buffer = entries.view(torch.uint8).numpy().data
        done = 0
        try:
            while done < len(buffer):
                got = self._read_some(buffer[done:], tensor, offset + done)
                if got == 0:
                    raise StorageError(
                        f"{self.where(tensor)}: the file ends before the tensor does; it changed while merging"
                    )
                done += got
        except OSError as problem:
            raise StorageError(f"{self.where(tensor)}: cannot be read: {problem.strerror}") from None
        self.bytes_read += done

    def _read_some(self, buffer: memoryview, tensor: StoredTensor, offset: int) -> int:
        if not self._locations[tensor.model].is_remote:
            return os.preadv(self._open(tensor), [buffer], offset)
        return self._open_remote(tensor).read_into(buffer, offset, tensor.end)

    def _open_remote(self, tensor: StoredTensor) -> StreamedFile:
        found = self._remote.get(tensor.model)
        if found is None or found.name != tensor.file:
            if found is not None:
                found.close()
            self._pool = self._pool or ThreadPoolExecutor(len(self._locations))
            try:
                found = StreamedFile(self._locations[tensor.model].ranged(tensor.file), self._pool)
            except CheckpointError as problem:
                # It was there when this was planned.
                raise StorageError(f"{self.where(tensor)}: cannot be read: {problem}") from None
            self._remote[tensor.model] = found
        return found

    def _open(self, tensor: StoredTensor) -> int:
        key = (tensor.model, tensor.file)
        if key not in self._files:
            self._files[key] = os.open(local_path(self._locations[tensor.model], tensor.file), os.O_RDONLY)
        return self._files[key]

    def close(self) -> None:
        for handle in self._files.values():
            os.close(handle)
        self._files.clear()
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
        for file in self._remote.values():
            file.close()
        self._remote.clear()


@contextmanager
def open_reader(locations: Sequence[Location]) -> Iterator[Reader]:
    reader = Reader(locations)
    try:
        yield reader
    finally:
        reader.close()


@lru_cache(maxsize=4096)
def local_path(location: Location, file: str) -> str:
    """`Location.local_path`, asked once per process and file."""
    return str(location.local_path(file))


def is_finite(entries: Tensor) -> bool:
    """False if an entry is NaN or infinite; integers always are finite. Twice as fast as `isfinite().all()`."""
    if entries.dtype not in _NON_FINITE or not entries.numel():
        return True
    as_int, mask, limit = _NON_FINITE[entries.dtype]
    return int((entries.view(as_int) & mask).max()) < limit
