"""Files on object storage that are read by byte ranges: some at any offset, or all that follows one."""

from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from raymerge.checkpoint.kept import KEPT
from raymerge.checkpoint.remote import WINDOW, Stamp, open_filesystem, persist
from raymerge.errors import StorageError


class RangedFile:
    """One file of `list_files`, of which ranges are read; it is opened when the first is asked for."""

    def __init__(self, uri: str, name: str, stamp: Stamp) -> None:
        self.name = name
        self.stamp = stamp
        self.where = f"{uri}/{name}"
        self._uri = uri
        self._file: Any = None

    def read(self, offset: int, size: int) -> bytes:
        """The bytes from an offset on, fewer where the file ends. Raises OSError."""
        key = (self.where, self.stamp, offset, size)
        found = KEPT.get(key)
        return found if found is not None else KEPT.add(key, persist(lambda: self._request(offset, size)))

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def _request(self, offset: int, size: int) -> bytes:
        if self._file is None:
            filesystem, root = open_filesystem(self._uri)
            self._file = filesystem.open_input_file(f"{root}/{self.name}")
        found: bytes = self._file.read_at(size, offset)
        return found


class StreamedFile:
    """A file that is read from some offset on; the range after the one that was asked for is on its way meanwhile."""

    def __init__(self, file: RangedFile, pool: ThreadPoolExecutor) -> None:
        self._file = file
        self._pool = pool
        self._start = 0
        self._held = b""
        self._coming: tuple[int, Future[bytes]] | None = None

    @property
    def name(self) -> str:
        return self._file.name

    def expect(self, offset: int, end: int) -> None:
        """Begin to fetch what lies between, which is read next."""
        if not self._holds(offset) and (self._coming is None or self._coming[0] != offset):
            self._coming = (offset, self._pool.submit(self._file.read, offset, min(WINDOW, end - offset)))

    def read_into(self, buffer: memoryview, offset: int, end: int) -> int:
        """Fill a buffer from an offset on; nothing at or after `end` is asked for. Returns the bytes it got.

        Raises StorageError if the file cannot be read.
        """
        if not self._holds(offset):
            self._advance(offset, end)
        first = offset - self._start
        part = memoryview(self._held)[first : first + len(buffer)]
        buffer[: len(part)] = part
        return len(part)

    def close(self) -> None:
        self._file.close()

    def _holds(self, offset: int) -> bool:
        return self._start <= offset < self._start + len(self._held)

    def _advance(self, offset: int, end: int) -> None:
        self.expect(offset, end)
        assert self._coming is not None
        try:
            held = self._coming[1].result()
        except OSError as problem:
            raise StorageError(f"{self._file.where}: cannot be read: {problem}") from None
        self._start, self._held, self._coming = offset, held, None
        after = offset + len(held)
        if held and after < end:
            self.expect(after, end)
