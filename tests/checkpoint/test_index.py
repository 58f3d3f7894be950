"""A whole checkpoint: its files, its index, and what makes it unfit to be read."""

import json
import os
from pathlib import Path

import pytest
import torch
from tiny import make_llama, save

from raymerge.checkpoint.index import open_checkpoint
from raymerge.checkpoint.location import Location, resolve
from raymerge.errors import CheckpointError

INDEX = "model.safetensors.index.json"


def sharded(folder: Path) -> Path:
    tensors = {name: torch.full((2,), float(i)) for i, name in enumerate("abcd")}
    return save(folder, tensors, {"model_type": "none"}, files=2)


def change_index(folder: Path, **changes: str) -> None:
    path = folder / INDEX
    content = json.loads(path.read_text())
    content["weight_map"].update(changes)
    path.write_text(json.dumps(content))


def test_shards_are_one_checkpoint(tmp_path: Path) -> None:
    found = open_checkpoint(str(sharded(tmp_path / "m")))
    assert sorted(found.tensors) == list("abcd")
    assert found.num_bytes == 32


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "m")
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match="model-00002-of-00002.safetensors"):
        open_checkpoint(str(folder))


@pytest.mark.parametrize("name", ["../other/model.safetensors", "/etc/passwd", "a/../../b", ".."])
def test_an_index_may_not_leave_its_folder(tmp_path: Path, name: str) -> None:
    save(tmp_path / "other", {"a": torch.zeros(2)})
    folder = sharded(tmp_path / "m")
    change_index(folder, a=name)
    with pytest.raises(CheckpointError, match="leaves its folder"):
        open_checkpoint(str(folder))


def test_a_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "m")
    first, second = (folder / f"model-0000{i}-of-00002.safetensors" for i in (1, 2))
    second.write_bytes(first.read_bytes())
    with pytest.raises(CheckpointError, match=r"a stands in model-00001-of-00002\S* and in model-00002-of-00002"):
        open_checkpoint(str(folder))


def test_an_index_must_say_where_tensors_are(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "m")
    change_index(folder, a="model-00002-of-00002.safetensors")
    with pytest.raises(CheckpointError, match="the index says a is in model-00002-of-00002.safetensors"):
        open_checkpoint(str(folder))
    change_index(folder, a="model-00001-of-00002.safetensors", e="model-00001-of-00002.safetensors")
    with pytest.raises(CheckpointError, match="the index says e is in"):
        open_checkpoint(str(folder))


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"weight_map": {"a": 5}}', '{"weight_map": ["a"]}', "\x00"])
def test_a_damaged_index_is_refused(tmp_path: Path, text: str) -> None:
    folder = sharded(tmp_path / "m")
    (folder / INDEX).write_text(text)
    with pytest.raises(CheckpointError, match=INDEX):
        open_checkpoint(str(folder))


def test_pickles_are_not_read(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(2)}, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="found pytorch_model.bin, which are pickles and are not read"):
        open_checkpoint(str(tmp_path))


def test_a_folder_without_weights_or_config(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no model.safetensors"):
        open_checkpoint(str(tmp_path))
    (save(tmp_path / "m", {"a": torch.zeros(2)}) / "config.json").unlink()
    with pytest.raises(CheckpointError, match="no config.json"):
        open_checkpoint(str(tmp_path / "m"))
    (tmp_path / "m" / "config.json").write_text("[1]")
    with pytest.raises(CheckpointError, match="an object is expected"):
        open_checkpoint(str(tmp_path / "m"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("./nothing", "no such folder"),
        ("/nothing/here", "no such folder"),
        ("nothing", "no such folder, and not a hub id"),
        ("a/b/c", "no such folder, and not a hub id"),
        ("ftp://bucket/x", "s3:// or gs:// is expected"),
    ],
)
def test_a_place_that_is_none(text: str, said: str) -> None:
    with pytest.raises(CheckpointError, match=said):
        resolve(text)


def test_a_folder_is_found_by_relative_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve("org/name") == Location(str(tmp_path / "org" / "name"))


def test_local_path_stays_inside(tmp_path: Path) -> None:
    location = Location(str(tmp_path))
    with pytest.raises(CheckpointError, match="leaves its folder"):
        location.local_path("../x")
    with pytest.raises(CheckpointError, match="no such file"):
        location.local_path("x")


def test_fingerprint_changes_with_the_bytes(tmp_path: Path) -> None:
    folder = make_llama(tmp_path / "m", 1)
    before = open_checkpoint(str(folder)).fingerprint
    assert open_checkpoint(str(folder)).fingerprint == before
    os.utime(folder / "model.safetensors", (1, 1))
    touched = open_checkpoint(str(folder)).fingerprint
    assert touched != before
    make_llama(folder, 1, dtype=torch.bfloat16)
    os.utime(folder / "model.safetensors", (1, 1))
    assert open_checkpoint(str(folder)).fingerprint not in (before, touched)
