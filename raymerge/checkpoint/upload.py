"""Write one safetensors file to object storage while its tensors are computed: a multipart upload, part by part."""

from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor

from raymerge.checkpoint.header import Layout, build_header
from raymerge.checkpoint.place import RemotePath
from raymerge.checkpoint.remote import ATTEMPTS, WINDOW
from raymerge.errors import StorageError


class UploadWriter:
    """A file whose layout is known, written in order; one part is on its way while the next one fills."""

    def __init__(self, stream: Any, starts: Mapping[str, int], pool: ThreadPoolExecutor, header: bytes) -> None:
        self._stream = stream
        self._starts = starts
        self._pool = pool
        self._part = bytearray(header)
        self._position = len(header)
        self._sent: Future[Any] | None = None
        self.bytes_written = 0

    def write(self, name: str, first: int, entries: Tensor) -> None:
        """Write flat `entries` of tensor `name` from entry `first` on, which must be where the last ones ended."""
        flat = entries.flatten()
        assert self._starts[name] + first * flat.element_size() == self._position, "uploads are written in order"
        buffer = flat.contiguous().view(torch.uint8).numpy().data
        self._part += buffer
        self._position += len(buffer)
        self.bytes_written += len(buffer)
        if len(self._part) >= WINDOW:
            self.flush()

    def flush(self) -> None:
        """Send what has been gathered, when the part before it has arrived."""
        if self._sent is not None:
            self._sent.result()
        self._sent = self._pool.submit(self._stream.write, self._part)
        self._part = bytearray()

    def end(self) -> None:
        """Wait until everything has arrived."""
        self.flush()
        assert self._sent is not None
        self._sent.result()


@contextmanager
def open_upload(path: RemotePath, tensors: Layout) -> Iterator[UploadWriter]:
    """Write a safetensors file of these tensors, in this order, to object storage.

    It appears under its name when the upload ends; of one that fails nothing is left. Raises StorageError.
    """
    header, entries = build_header(tensors)
    size = len(header) + sum(entry.num_bytes for entry in entries)
    with path.open(attempts=ATTEMPTS) as (filesystem, name):
        stream = filesystem.open_output_stream(name)
        try:
            with ThreadPoolExecutor(1) as pool:
                writer = UploadWriter(stream, {entry.name: entry.start for entry in entries}, pool, header)
                yield writer
                writer.end()
            stream.close()
        except BaseException:
            # pyarrow cannot abandon an upload, only end it with what has arrived.
            with suppress(OSError, ValueError):
                stream.close()
            with suppress(OSError, StorageError):
                path.unlink()
            raise
    if path.num_bytes != size:
        raise StorageError(f"{path}: {path.num_bytes} bytes have arrived of {size}; run the same command again")
