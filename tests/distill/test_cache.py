"""What does not fit in memory comes back from disk as it was."""

import os
from pathlib import Path

import pytest
import torch

from raymerge.distill import cache as cache_module
from raymerge.distill.cache import ActivationCache
from raymerge.errors import StorageError


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("limit", [0, 100, 10**6])
def test_the_same_tensors_come_back(dtype: torch.dtype, limit: int) -> None:
    cache = ActivationCache(limit)
    put = {f"student-{number}": torch.randn(2, 3, 4).to(dtype) for number in range(3)}
    for key, value in put.items():
        cache.put(key, value)
    cache.put("student-1", put["student-1"] + 1)
    put["student-1"] = put["student-1"] + 1
    cache.put("transposed", put["student-2"].transpose(0, 2))
    put["transposed"] = put["student-2"].transpose(0, 2)
    cache.drop("student-0")
    cache.drop("never there")
    del put["student-0"]
    for key, value in put.items():
        found = cache.get(key)
        assert found.dtype == dtype and torch.equal(found, value)
    with pytest.raises(KeyError):
        cache.get("student-0")


def test_what_is_dropped_makes_room(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cache_module.tempfile, "tempdir", str(tmp_path))
    cache = ActivationCache(limit=40)
    cache.put("first", torch.zeros(10))
    for number in range(5):
        cache.put("second", torch.full((10,), number))
        cache.put("third", torch.full((10,), -number, dtype=torch.float64))
        assert torch.equal(cache.get("second"), torch.full((10,), number))
        assert torch.equal(cache.get("third"), torch.full((10,), -number, dtype=torch.float64))
    # One place on the disk for each size, and no name that a killed process could leave.
    assert os.fstat(cache._file().fileno()).st_size == 80 + 80 and not list(tmp_path.iterdir())
    cache.drop("first")
    cache.put("second", torch.ones(10))
    assert torch.equal(cache.get("second"), torch.ones(10))


def test_a_disk_that_takes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module.tempfile, "tempdir", "/proc")
    with pytest.raises(StorageError, match="/proc: 40 bytes of activations cannot be written: .*set TMPDIR"):
        ActivationCache(limit=0).put("first", torch.zeros(10))
