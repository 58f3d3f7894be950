"""Files on object storage (`s3://`, `gs://`) through pyarrow.fs: listed, or fetched whole.

Credentials, region and endpoint come from the usual environment variables. Requests that fail are tried again with
growing pauses.
"""

import hashlib
import os
import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

from raymerge.errors import CheckpointError

Result = TypeVar("Result")

Stamp = tuple[int, int]
"""Size in bytes and modification time in ns of a file."""

# A request takes tens of milliseconds whatever it asks for; a file that is read or written holds two of this size.
WINDOW = 8 * 2**20
ATTEMPTS = 6
FIRST_PAUSE_SECONDS = 0.1


def is_remote(text: str) -> bool:
    """A place that pyarrow.fs knows, and not a folder."""
    return "://" in text


NO_CREDENTIALS = "credentials in a place would be in logs; give them in the environment"


def has_credentials(text: str) -> bool:
    """A place with a user before its host, as `s3://KEY:SECRET@bucket`."""
    return "@" in text.partition("://")[2].partition("/")[0]


@lru_cache(maxsize=64)
def open_filesystem(uri: str, attempts: int = 2) -> tuple[Any, str]:
    """The file system of a place, and its path there. Raises OSError, ValueError for a place that cannot be.

    It makes each request so often by itself: few times where `persist` makes it again, `ATTEMPTS` for streams, of which
    no more than the request can be made again.
    """
    from pyarrow import fs

    if not uri.startswith("s3://"):
        filesystem, path = fs.FileSystem.from_uri(uri)
        return filesystem, path.rstrip("/")
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    filesystem = fs.S3FileSystem(
        endpoint_override=endpoint,
        region=region,
        # It pauses longer where it is told to slow down.
        retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=attempts),
        # A small file is one request, not an upload of parts.
        allow_delayed_open=True,
    )
    return filesystem, uri.removeprefix("s3://").rstrip("/")


def list_files(uri: str) -> dict[str, Stamp]:
    """The files at a place, by name. Raises CheckpointError."""
    from pyarrow import fs

    def listed() -> dict[str, Stamp]:
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


def fetch(uri: str, name: str, stamp: Stamp) -> Path:
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
