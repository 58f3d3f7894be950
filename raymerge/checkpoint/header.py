"""The header of a safetensors file: read and checked before a byte of data is trusted, or made.

Format: 8 bytes little-endian length n, n bytes of JSON {name: {dtype, shape, data_offsets}}, data.
Tensors lie without holes or overlaps and end where the file ends.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from threading import Lock
from typing import Any

import torch

from raymerge.errors import CheckpointError

MAX_HEADER_BYTES = 100_000_000

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}

Layout = Iterable[tuple[str, torch.dtype, tuple[int, ...]]]
"""Name, dtype and shape of the tensors of a file, in order of their bytes."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of a file: safetensors dtype name, shape, and where its bytes start in the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int

    @property
    def num_elements(self) -> int:
        return prod(self.shape)

    @property
    def num_bytes(self) -> int:
        return self.num_elements * DTYPES[self.dtype].itemsize


def header_length(first: bytes, file_bytes: int, where: str) -> int:
    """The length of the JSON from the first 8 bytes of a file. Raises CheckpointError if it cannot be."""
    length = int.from_bytes(first, "little")
    if len(first) < 8 or length > min(MAX_HEADER_BYTES, file_bytes - 8):
        raise CheckpointError(
            f"{where}: not a safetensors file, or cut short: {file_bytes} bytes with a header said to "
            f"have {length}; copy or download it again"
        )
    return length


def parse_header(text: bytes, file_bytes: int, where: str) -> tuple[Entry, ...]:
    """The entries of a file in the order of their bytes.

    Raises CheckpointError if the JSON is damaged, a dtype is not supported, or the data offsets leave
    holes, overlap, or do not end where the file ends.
    """
    try:
        listed: dict[str, Any] = json.loads(text, object_pairs_hook=_no_duplicates)
        listed.pop("__metadata__", None)
        spans = sorted(
            (
                int(e["data_offsets"][0]),
                int(e["data_offsets"][1]),
                name,
                str(e["dtype"]),
                tuple(map(int, e["shape"])),
            )
            for name, e in listed.items()
        )
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as problem:
        raise CheckpointError(f"{where}: damaged header ({problem}); copy or download it again") from None
    data = 8 + len(text)
    entries = []
    end = 0
    for start, stop, name, dtype, shape in spans:
        if dtype not in DTYPES:
            raise CheckpointError(
                f"{where}: {name}: dtype {dtype} cannot be merged; convert it to one of {', '.join(DTYPES)}"
            )
        if start != end or min(shape, default=0) < 0 or stop - start != prod(shape) * DTYPES[dtype].itemsize:
            raise CheckpointError(
                f"{where}: {name}: bytes {start} to {stop} for {dtype} {shape} after byte {end}; the header "
                f"is damaged, copy or download it again"
            )
        end = stop
        entries.append(Entry(name, dtype, shape, data + start))
    if data + end != file_bytes:
        raise CheckpointError(
            f"{where}: {file_bytes} bytes found, {data + end} expected from its header; the file is cut "
            f"short or damaged, copy or download it again"
        )
    return tuple(entries)


class Headers:
    """Headers of several checkpoints. Fine-tuned ones are laid out as their base: the same bytes are parsed once."""

    def __init__(self) -> None:
        self._known: dict[tuple[bytes, int], tuple[Entry, ...]] = {}
        self._lock = Lock()

    def parse(self, text: bytes, file_bytes: int, where: str) -> tuple[Entry, ...]:
        """As `parse_header`; a thread that comes with a header that another parses waits for its entries."""
        with self._lock:
            key = (text, file_bytes)
            if key not in self._known:
                self._known[key] = parse_header(text, file_bytes, where)
            return self._known[key]


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key stands twice")
    return found


def build_header(tensors: Layout) -> tuple[bytes, tuple[Entry, ...]]:
    """The first bytes of a file for tensors laid out in the order given, and where each starts."""
    listed: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, dtype, shape in tensors:
        size = prod(shape) * dtype.itemsize
        listed[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(listed, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    head = len(text).to_bytes(8, "little") + text
    return head, parse_header(text, len(head) + end, "new shard")


def layout_bytes(tensors: Layout) -> int:
    """The size of a file of these tensors."""
    head, entries = build_header(tensors)
    return len(head) + sum(entry.num_bytes for entry in entries)
