"""Activations of many batches, in memory up to a limit, and beyond it in files of a temporary folder."""

import tempfile
from pathlib import Path

import torch
from torch import Tensor

from raymerge.errors import StorageError

LIMIT = 2**30


class ActivationCache:
    """Tensors by key; one that is put again replaces what was there. None is empty; each stays on its device."""

    def __init__(self, limit: int = LIMIT) -> None:
        self._limit = limit
        self._held: dict[str, Tensor] = {}
        self._spilled: dict[str, tuple[torch.dtype, tuple[int, ...], torch.device]] = {}
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._held_bytes = 0

    def put(self, key: str, tensor: Tensor) -> None:
        """Keep a tensor of any shape and dtype. Raises StorageError if it goes to a file, which cannot be written."""
        self.drop(key)
        if self._held_bytes + tensor.nbytes <= self._limit:
            self._held[key] = tensor
            self._held_bytes += tensor.nbytes
            return
        flat = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
        try:
            flat.numpy().tofile(self._path(key))
        except OSError as problem:
            raise StorageError(
                f"{tempfile.gettempdir()}: {flat.nbytes} bytes of activations cannot be written: {problem}; "
                "free some space on this node, or set TMPDIR to a larger disk there"
            ) from None
        self._spilled[key] = (tensor.dtype, tuple(tensor.shape), tensor.device)

    def get(self, key: str) -> Tensor:
        if key in self._held:
            return self._held[key]
        dtype, shape, device = self._spilled[key]
        # Read, not mapped: a mapped file would count as this process's memory.
        return torch.frombuffer(bytearray(self._path(key).read_bytes()), dtype=dtype).view(shape).to(device)

    def drop(self, key: str) -> None:
        if key in self._held:
            self._held_bytes -= self._held.pop(key).nbytes
        elif key in self._spilled:
            self._path(key).unlink()
            del self._spilled[key]

    def _path(self, key: str) -> Path:
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="raymerge-activations-")
        return Path(self._folder.name) / key
