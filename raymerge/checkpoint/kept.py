"""Ranges of files on object storage that this process keeps, as the kernel keeps pages of files on disks."""

from threading import Lock

from raymerge.checkpoint.remote import Stamp

Range = tuple[str, Stamp, int, int]
"""A file and its stamp, the first byte and the number of bytes."""


class Kept:
    """The first ranges that come are kept, while there is room for them; at first there is none."""

    def __init__(self) -> None:
        self._ranges: dict[Range, bytes] = {}
        self._room = 0
        self._lock = Lock()

    def make_room(self, num_bytes: int) -> None:
        """Keep so many bytes from now on."""
        with self._lock:
            self._ranges.clear()
            self._room = num_bytes

    def get(self, key: Range) -> bytes | None:
        return self._ranges.get(key)

    def add(self, key: Range, content: bytes) -> bytes:
        """Keep a range if there is room; returns its content."""
        with self._lock:
            if key not in self._ranges and len(content) <= self._room:
                self._ranges[key] = content
                self._room -= len(content)
        return content


KEPT = Kept()
