"""Files on object storage (`s3://`, `gs://`) through pyarrow.fs: listed, fetched whole, or read by byte ranges.

Credentials, region and endpoint come from the usual environment variables. Requests that fail are tried again with
growing pauses.
"""

import hashlib
import os
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

from raymerge.errors import CheckpointError, StorageError

Result = TypeVar("Result")

# A request takes tens of milliseconds whatever it asks for; an open file holds two windows of this size.
WINDOW = 8 * 2**20
ATTEMPTS = 6
FIRST_PAUSE_SECONDS = 0.1


def is_remote(text: str) -> bool:
    """A place that pyarrow.fs knows, and not a folder."""
    return "://" in text


@lru_cache(maxsize=64)
def open_filesystem(uri: str) -> tuple[Any, str]:
    """The file system of a place, and its path there. Raises OSError, ValueError for a place that cannot be."""
    from pyarrow import fs

    if not uri.startswith("s3://"):
        filesystem, path = fs.FileSystem.from_uri(uri)
        return filesystem, path.rstrip("/")
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    filesystem = fs.S3FileSystem(
        endpoint_override=endpoint,
        region=region,
        # Of its own, within each of ours: it pauses longer where it is told to slow down.
        retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=2),
        # A small file is one request, not an upload of parts.
        allow_delayed_open=True,
    )
    return filesystem, uri.removeprefix("s3://").rstrip("/")


def list_files(uri: str) -> dict[str, tuple[int, int]]:
    """Name, size in bytes and modification time in ns of the files at a place. Raises CheckpointError."""
    from pyarrow import fs

    def listed() -> dict[str, tuple[int, int]]:
        filesystem, path = open_filesystem(uri)
        found = filesystem.get_file_info(fs.FileSelector(path, allow_not_found=True))
        return {
            info.base_name: (info.size, info.mtime_ns)
            for info in sorted(found, key=lambda info: str(info.base_name))
            if info.type == fs.FileType.File
        }

    try:
        return persist(listed)
    except (OSError, ValueError) as problem:
        raise CheckpointError(f"{uri}: cannot be listed: {problem}") from None


def fetch(uri: str, name: str, stamp: tuple[int, int]) -> Path:
    """A local copy of a small file, kept in `~/.cache/raymerge` while it does not change. Raises CheckpointError."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "raymerge"
    # A folder for each place, in which files stand as tokenizers expect them.
    place = cache / hashlib.sha256(uri.encode()).hexdigest()[:16] / f"{stamp[0]}-{stamp[1]}"
    path = place / name
    if path.is_file():
        return path
    from raymerge.checkpoint.writer import replacing

    def copied() -> bytes:
        filesystem, root = open_filesystem(uri)
        with filesystem.open_input_stream(f"{root}/{name}") as stream:
            content: bytes = stream.read()
        return content

    try:
        content = persist(copied)
    except (OSError, ValueError) as problem:
        raise CheckpointError(f"{uri}/{name}: cannot be read: {problem}") from None
    with replacing(path) as temporary:
        temporary.write_bytes(content)
    return path


def persist(request: Callable[[], Result]) -> Result:
    """Make a request, again and again while it fails, with growing pauses; what is not there is not asked for twice."""
    for attempt in range(ATTEMPTS):
        try:
            return request()
        except FileNotFoundError:
            raise
        except OSError:
            if attempt + 1 == ATTEMPTS:
                raise
            time.sleep(FIRST_PAUSE_SECONDS * 2**attempt)
    raise AssertionError("the last attempt returns or raises")


class RemoteFile:
    """One file, read by ranges; the range after the one that was asked for is on its way meanwhile."""

    def __init__(self, uri: str, name: str, pool: ThreadPoolExecutor) -> None:
        self.name = name
        self._where = f"{uri}/{name}"
        filesystem, root = open_filesystem(uri)
        self._file = persist(lambda: filesystem.open_input_file(f"{root}/{name}"))
        self._pool = pool
        self._start = 0
        self._held = b""
        self._coming: tuple[int, Future[bytes]] | None = None

    def read_into(self, buffer: memoryview, offset: int, end: int) -> int:
        """Fill a buffer from an offset on; nothing at or after `end` is asked for. Returns the bytes it got.

        Raises StorageError if the file cannot be read.
        """
        if not self._start <= offset < self._start + len(self._held):
            self._advance(offset, end, len(buffer))
        first = offset - self._start
        part = memoryview(self._held)[first : first + len(buffer)]
        buffer[: len(part)] = part
        return len(part)

    def close(self) -> None:
        self._file.close()

    def _advance(self, offset: int, end: int, wanted: int) -> None:
        size = min(max(WINDOW, wanted), end - offset)
        try:
            if self._coming is not None and self._coming[0] == offset:
                held = self._coming[1].result()
            else:
                held = self._request(offset, size)
        except OSError as problem:
            raise StorageError(f"{self._where}: cannot be read: {problem}") from None
        self._start, self._held = offset, held
        after = offset + len(held)
        self._coming = None
        if held and after < end:
            self._coming = (after, self._pool.submit(self._request, after, min(WINDOW, end - after)))

    def _request(self, offset: int, size: int) -> bytes:
        found: bytes = persist(lambda: self._file.read_at(size, offset))
        return found
