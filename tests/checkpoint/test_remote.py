"""Checkpoints on a real S3 protocol server merge as folders do, and every byte of their weights is read once."""

from pathlib import Path

import pytest
from storage import Storage
from tiny import make_llama, recipe, weights

from raymerge import api
from raymerge.checkpoint import ranges
from raymerge.checkpoint.index import open_checkpoint
from raymerge.checkpoint.kept import Kept
from raymerge.checkpoint.remote import open_filesystem
from raymerge.errors import CheckpointError, StorageError

pytest.importorskip("moto")


def family(folder: Path, storage: Storage) -> tuple[list[str], list[str]]:
    """A base and two experts, as folders and on the server."""
    for seed, name in enumerate(("base", "a", "b")):
        make_llama(folder / name, seed, blocks=2)
    local = [str(folder / name) for name in ("base", "a", "b")]
    return local, [storage.upload(Path(place), Path(place).name) for place in local]


@pytest.mark.parametrize("window", [1000, ranges.WINDOW])
@pytest.mark.parametrize("method", ["task_arithmetic", "model_stock"])
def test_the_same_bytes_as_from_folders(
    method: str, window: int, storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranges, "WINDOW", window)
    local, there = family(tmp_path, storage)
    api.merge(recipe(*map(Path, local), method=method), tmp_path / "expected", local=True)
    asked = {**recipe(*map(Path, local), method=method), "base": there[0]}
    asked["experts"] = dict(zip(asked["experts"], there[1:], strict=True))
    storage.served.clear()
    api.merge(asked, tmp_path / "out", local=True)
    assert weights(tmp_path / "out") == weights(tmp_path / "expected")
    held = sum(entry.num_bytes for _, entry in open_checkpoint(local[1]).tensors.values())
    headers = 2 * sum(path.stat().st_size for path in Path(local[1]).glob("*.safetensors")) - 2 * held
    assert held <= storage.bytes_served("/a/model") <= held + headers
    # No whole copy of the weights stays behind.
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


def test_one_request_in_ten_fails(storage: Storage, tmp_path: Path) -> None:
    local, there = family(tmp_path, storage)
    expected = recipe(*map(Path, local), method="task_arithmetic")
    api.merge(expected, tmp_path / "expected", local=True)
    storage.fail_every = 10
    asked = {**expected, "base": there[0], "experts": dict(zip(expected["experts"], there[1:], strict=True))}
    api.merge(asked, tmp_path / "out", local=True)
    assert storage.failed > 2
    assert weights(tmp_path / "out") == weights(tmp_path / "expected")


def test_places_that_are_not_there(storage: Storage, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there are no files, or none that you may see"):
        open_checkpoint("s3://models/nothing")
    with pytest.raises(CheckpointError, match="there are no files, or none that you may see"):
        open_checkpoint("s3://no-such-bucket/x")
    with pytest.raises(CheckpointError, match="s3:// or gs:// is expected"):
        open_checkpoint("ftp://host/x")
    with pytest.raises(CheckpointError, match="^credentials in a place would be in logs; give them in the environment"):
        open_checkpoint("s3://KEY:SECRET@models/a")


def test_what_is_kept_is_not_asked_for_again(storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = Kept()
    monkeypatch.setattr(ranges, "KEPT", kept)
    local, there = family(tmp_path, storage)
    asked = recipe(*map(Path, local), method="task_arithmetic")
    asked |= {"base": there[0], "experts": dict(zip(asked["experts"], there[1:], strict=True))}

    def bytes_read() -> int:
        storage.served.clear()
        api.merge(asked, tmp_path / "out", local=True, overwrite=True)
        return storage.bytes_served("/model.safetensors")

    everything = bytes_read()
    kept.make_room(everything // 3)
    assert bytes_read() == everything
    assert 2 * everything / 3 <= bytes_read() < everything
    kept.make_room(everything)
    assert bytes_read() == everything
    assert bytes_read() == 0
    # A file of the same size that is another is read.
    before = weights(tmp_path / "out")
    storage.upload(make_llama(tmp_path / "another", seed=9, blocks=2), "b")
    assert 0 < bytes_read() < everything
    assert weights(tmp_path / "out") != before


def test_a_file_that_goes_away_is_an_error(storage: Storage, tmp_path: Path) -> None:
    local, there = family(tmp_path, storage)
    asked = recipe(*map(Path, local), method="task_arithmetic")
    asked = {**asked, "base": there[0], "experts": dict(zip(asked["experts"], there[1:], strict=True))}

    def remove(*_: object) -> None:
        filesystem, _path = open_filesystem(there[1])
        filesystem.delete_dir_contents("models/a")

    asked["output"] = {"shard_size": 6000}
    with pytest.raises(StorageError, match="s3://models/a/model.safetensors"):
        api.merge(asked, tmp_path / "out", local=True, workers=1, progress=remove)
    assert not (tmp_path / "out").exists()
