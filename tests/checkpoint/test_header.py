"""A safetensors header is believed only when it fits its file; and ours is read by the safetensors library."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import save
from torch import Tensor

from raymerge.checkpoint.header import Entry, build_header, header_length, parse_header
from raymerge.checkpoint.index import open_checkpoint
from raymerge.checkpoint.location import Location
from raymerge.checkpoint.reader import StoredTensor, is_finite, open_reader
from raymerge.checkpoint.writer import open_shard
from raymerge.errors import CheckpointError, StorageError


def entry(dtype: str = "F32", shape: tuple[int, ...] = (2,), offsets: tuple[int, int] = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def write(folder: Path, header: bytes | dict[str, Any], data: int, length: int | None = None) -> Path:
    """A checkpoint whose file has this header, whatever it says, and this many bytes of data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    folder.mkdir(exist_ok=True)
    head = (len(text) if length is None else length).to_bytes(8, "little")
    (folder / "model.safetensors").write_bytes(head + text + bytes(data))
    (folder / "config.json").write_text("{}")
    return folder


def test_a_sound_file_is_read(tmp_path: Path) -> None:
    found = open_checkpoint(str(write(tmp_path / "m", {"__metadata__": {"a": "b"}, "x": entry()}, 8)))
    assert [(file, e.name, e.shape) for file, e in found.tensors.values()] == [("model.safetensors", "x", (2,))]


@pytest.mark.parametrize(
    ("header", "data", "said"),
    [
        ({"x": entry()}, 7, "cut short"),
        ({"x": entry()}, 9, "cut short or damaged"),
        ({"x": entry(), "y": entry(offsets=(4, 12))}, 12, "y: bytes 4 to 12"),
        ({"x": entry(), "y": entry(offsets=(0, 8))}, 8, "y: bytes 0 to 8"),
        ({"x": entry(), "y": entry(offsets=(12, 20))}, 20, "y: bytes 12 to 20"),
        ({"x": entry(offsets=(4, 12))}, 12, "x: bytes 4 to 12"),
        ({"x": entry(shape=(3,))}, 8, "x: bytes 0 to 8"),
        ({"x": entry(shape=(-1, -2))}, 8, "x: bytes 0 to 8"),
        ({"x": entry(offsets=(8, 0))}, 8, "x: bytes 8 to 0"),
        ({"x": entry(dtype="F8_E4M3", offsets=(0, 2))}, 2, "x: dtype F8_E4M3 cannot be merged"),
        ({"x": {"dtype": "F32", "shape": [2]}}, 8, "damaged header"),
        ({"x": [1, 2]}, 8, "damaged header"),
        ({"x": entry() | {"shape": "ab"}}, 8, "damaged header"),
        (b"[1, 2]", 0, "damaged header"),
        (b'{"x": {"dtype"', 8, "damaged header"),
        (b"\xff\xfe{}", 8, "damaged header"),
        (b"[" * 100_000, 0, "damaged header"),
        (b'{"x": %s, "x": %s}' % ((json.dumps(entry()).encode(),) * 2), 8, "a key stands twice"),
    ],
)
def test_a_damaged_file_is_refused(tmp_path: Path, header: Any, data: int, said: str) -> None:
    folder = write(tmp_path / "m", header, data)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(str(folder))
    assert said in str(caught.value)
    assert str(folder / "model.safetensors") in str(caught.value)


@pytest.mark.parametrize("length", [10_000, 2**40, 2**63])
def test_a_header_longer_than_its_file_is_never_allocated(tmp_path: Path, length: int) -> None:
    folder = write(tmp_path / "m", {"x": entry()}, 8, length=length)
    with pytest.raises(CheckpointError, match=f"said to have {length}"):
        open_checkpoint(str(folder))


def test_a_header_above_the_limit_is_refused() -> None:
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        header_length((100_000_001).to_bytes(8, "little"), 10**12, "here")


@pytest.mark.parametrize("size", [0, 5, 8])
def test_a_file_too_short_for_a_header(tmp_path: Path, size: int) -> None:
    folder = write(tmp_path / "m", {"x": entry()}, 8)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(CheckpointError):
        open_checkpoint(str(folder))


def various() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    found = {
        "f64": torch.randn(3, 2, generator=generator, dtype=torch.float64),
        "scalar": torch.tensor(1.5),
        "empty": torch.empty(0, 4),
        "empty_half": torch.empty(3, 0, dtype=torch.float16),
        "ünï/cødé": torch.randn(4, 3, generator=generator),
        "bf16": torch.randn(5, generator=generator).to(torch.bfloat16),
        "f16": torch.randn(5, generator=generator).to(torch.float16),
        "flags": torch.tensor([True, False, True]),
    }
    for dtype in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8):
        found[str(dtype)] = torch.randint(0, 100, (7,), generator=generator).to(dtype)
    return found


def test_what_we_write_the_library_reads(tmp_path: Path) -> None:
    tensors = various()
    path = tmp_path / "sub" / "model.safetensors"
    with open_shard(path, [(name, t.dtype, tuple(t.shape)) for name, t in tensors.items()]) as writer:
        for name, tensor in tensors.items():
            half = tensor.numel() // 2
            writer.write(name, half, tensor.flatten()[half:])
            writer.write(name, 0, tensor.flatten()[:half])
        assert not path.exists()
    found = load_file(path)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape
        assert torch.equal(found[name], tensor)
    assert writer.bytes_written == sum(t.nbytes for t in tensors.values())
    assert [p.name for p in path.parent.iterdir()] == ["model.safetensors"]


def test_what_the_library_writes_we_read(tmp_path: Path) -> None:
    tensors = various()
    checkpoint = open_checkpoint(str(save(tmp_path / "m", tensors)))
    assert checkpoint.tensors.keys() == tensors.keys()
    assert checkpoint.num_bytes == sum(t.nbytes for t in tensors.values())
    with open_reader([checkpoint.location]) as reader:
        for name, tensor in tensors.items():
            file, e = checkpoint.tensors[name]
            stored = StoredTensor(0, file, name, e.start, e.dtype, e.shape)
            assert torch.equal(reader.read(stored, 0, e.num_elements).view(e.shape), tensor)
            if tensor.numel() > 2:
                assert torch.equal(reader.read(stored, 1, 2), tensor.flatten()[1:3])


def test_header_places_tensors_as_given() -> None:
    head, entries = build_header([("b", torch.float32, (2,)), ("a", torch.bool, (3,))])
    assert len(head) % 8 == 0
    assert entries == (Entry("b", "F32", (2,), len(head)), Entry("a", "BOOL", (3,), len(head) + 8))
    assert parse_header(head[8:], len(head) + 11, "x") == entries


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyError), open_shard(tmp_path / "x.safetensors", [("a", torch.float32, (2,))]) as writer:
        writer.write("b", 0, torch.zeros(2))
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot be written"), open_shard(tmp_path / "file" / "x", []):
        raise AssertionError("never opened")


def test_a_file_that_shrinks_while_merging_is_named(tmp_path: Path) -> None:
    save_file({"x": torch.ones(100)}, tmp_path / "model.safetensors")
    stored = StoredTensor(0, "model.safetensors", "x", 100, "F32", (100,))
    with open_reader([Location(str(tmp_path))]) as reader:
        reader.read(stored, 0, 1)
        (tmp_path / "model.safetensors").write_bytes(b"short")
        with pytest.raises(StorageError, match=r"model.safetensors: x: the file ends before the tensor does"):
            reader.read(stored, 0, 100)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_is_finite_sees_one_bad_entry(dtype: torch.dtype) -> None:
    entries = torch.tensor([0.0, -0.0, 1.5, -2.5, torch.finfo(dtype).max, torch.finfo(dtype).min]).to(dtype)
    entries = torch.where(entries.isinf(), torch.finfo(dtype).max, entries.double()).to(dtype)
    assert is_finite(entries)
    for bad in (float("nan"), float("inf"), float("-inf"), -float("nan")):
        for i in (0, 5):
            broken = entries.clone()
            broken[i] = bad
            assert not is_finite(broken)
    assert is_finite(torch.empty(0, dtype=dtype))
