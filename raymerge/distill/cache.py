"""Activations of many batches, in memory up to a limit, and beyond it in files of a temporary folder."""

import tempfile
from pathlib import Path

import torch
from torch import Tensor

LIMIT = 2**30


class ActivationCache:
    """Tensors by key; one that is put again replaces what was there. Float dtypes, any shape."""

    def __init__(self, limit: int = LIMIT) -> None:
        self._limit = limit
        self._held: dict[str, Tensor] = {}
        self._spilled: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self.held_bytes = 0
        self.spilled_bytes = 0

    def put(self, key: str, tensor: Tensor) -> None:
        self.drop(key)
        if self.held_bytes + tensor.nbytes <= self._limit:
            self._held[key] = tensor
            self.held_bytes += tensor.nbytes
            return
        flat = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
        flat.numpy().tofile(self._path(key))
        self._spilled[key] = (tensor.dtype, tuple(tensor.shape))
        self.spilled_bytes += tensor.nbytes

    def get(self, key: str) -> Tensor:
        if key in self._held:
            return self._held[key]
        dtype, shape = self._spilled[key]
        path = self._path(key)
        # Read, not mapped: a mapped file would count as this process's memory.
        found = torch.frombuffer(bytearray(path.read_bytes()), dtype=dtype) if shape else torch.empty(0)
        return found.view(shape)

    def drop(self, key: str) -> None:
        if key in self._held:
            self.held_bytes -= self._held.pop(key).nbytes
        elif key in self._spilled:
            path = self._path(key)
            self.spilled_bytes -= path.stat().st_size
            path.unlink()
            del self._spilled[key]

    def _path(self, key: str) -> Path:
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="raymerge-activations-")
        return Path(self._folder.name) / key
