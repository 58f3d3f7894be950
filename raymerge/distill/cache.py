"""Activations of many batches, in memory up to a limit, and beyond it in a file that ends with this process."""

import math
import tempfile
from io import BufferedRandom

import torch
from torch import Tensor

from raymerge.errors import StorageError

LIMIT = 2**30


class ActivationCache:
    """Tensors by key; one that is put again replaces what was there. None is empty; each stays on its device."""

    def __init__(self, limit: int = LIMIT) -> None:
        self._limit = limit
        self._held: dict[str, Tensor] = {}
        self._held_bytes = 0
        # Dtype, shape, device and first byte of those in the file; places of others that were there, by their size.
        self._spilled: dict[str, tuple[torch.dtype, tuple[int, ...], torch.device, int]] = {}
        self._free: dict[int, list[int]] = {}
        self._end = 0
        self._opened: BufferedRandom | None = None

    def put(self, key: str, tensor: Tensor) -> None:
        """Keep a tensor of any shape and dtype. Raises StorageError if it goes to the file, which cannot be written."""
        self.drop(key)
        if self._held_bytes + tensor.nbytes <= self._limit:
            self._held[key] = tensor
            self._held_bytes += tensor.nbytes
            return
        flat = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
        start = self._place(flat.nbytes)
        try:
            self._file().seek(start)
            self._file().write(flat.numpy().data)
            self._file().flush()
        except OSError as problem:
            raise StorageError(
                f"{tempfile.gettempdir()}: {flat.nbytes} bytes of activations cannot be written: {problem}; "
                "free some space on this node, or set TMPDIR to a larger disk there"
            ) from None
        self._spilled[key] = (tensor.dtype, tuple(tensor.shape), tensor.device, start)

    def get(self, key: str) -> Tensor:
        if key in self._held:
            return self._held[key]
        dtype, shape, device, start = self._spilled[key]
        found = torch.empty(shape, dtype=dtype)
        self._file().seek(start)
        # Read, not mapped: a mapped file would count as this process's memory.
        self._file().readinto(found.flatten().view(torch.uint8).numpy().data)
        return found.to(device)

    def drop(self, key: str) -> None:
        if key in self._held:
            self._held_bytes -= self._held.pop(key).nbytes
        elif key in self._spilled:
            dtype, shape, _, start = self._spilled.pop(key)
            self._free.setdefault(math.prod(shape) * dtype.itemsize, []).append(start)

    def _place(self, num_bytes: int) -> int:
        """Where there is room in the file: the tensors of a walk have the same sizes again and again."""
        if self._free.get(num_bytes):
            return self._free[num_bytes].pop()
        self._end += num_bytes
        return self._end - num_bytes

    def _file(self) -> BufferedRandom:
        if self._opened is None:
            # Without a name: however this process ends, nothing is left on the disk.
            self._opened = tempfile.TemporaryFile(prefix="raymerge-activations-")
        return self._opened
