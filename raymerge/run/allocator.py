"""Tell the C allocator to keep the chunks it gets back, instead of returning them to the kernel each time.

A merge allocates and frees buffers of a megabyte by the ten thousand. glibc gives such memory back and
takes it again, page by page: a million page faults, a third of the time of a simple merge. Larger
buffers (32 MiB and up: whole tensors) are still returned at once.
"""

import contextlib
import ctypes
from functools import cache

# From glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3


@cache
def keep_freed_chunks() -> None:
    """Set this process's malloc up, once; does nothing where the C library is another."""
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(_MMAP_THRESHOLD, 32 * 2**20)
        libc.mallopt(_TRIM_THRESHOLD, 512 * 2**20)
