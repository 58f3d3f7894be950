"""Outputs on a real S3 protocol server: the bytes of a local output, whole files only, and the manifest last."""

import json
from pathlib import Path
from typing import Any

import command
import pyarrow.parquet as pq
import pytest
import torch
from run.test_search import PER_EXPERT, family
from samples import make_family
from storage import Storage
from tiny import make_llama, recipe, weights

import raymerge
from raymerge import api
from raymerge.checkpoint import upload
from raymerge.checkpoint.place import RemotePath
from raymerge.errors import OutputError, RayMergeError, StorageError

pytest.importorskip("moto")

OUT = "s3://models/merged/out"


@pytest.fixture
def asked(tmp_path: Path) -> dict[str, Any]:
    """A merge of four files."""
    places = [make_llama(tmp_path / name, seed, blocks=2) for seed, name in enumerate(("base", "a", "b"))]
    return recipe(*places, method="task_arithmetic", output={"shard_size": 6000})


@pytest.mark.parametrize("part", [1000, upload.WINDOW])
def test_the_bytes_of_a_local_output(
    part: int, asked: dict[str, Any], storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upload, "WINDOW", part)
    api.merge(asked, tmp_path / "out", local=True)
    found = api.merge(asked, OUT, local=True)
    assert str(found.out) == OUT
    copy = storage.download(OUT, tmp_path / "copy")
    assert weights(copy) == weights(tmp_path / "out") and len(found.plan.shards) > 2
    files = {path.relative_to(copy).as_posix() for path in copy.rglob("*") if path.is_file()}
    here = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert files == here
    assert (copy / "config.json").read_text() == (tmp_path / "out" / "config.json").read_text()
    order = list(dict.fromkeys(line.partition("/merged/out/")[2] for line in storage.written if "/out/" in line))
    assert order[0] == "raymerge/plan.sha256"
    assert order[-3:] == ["model.safetensors.index.json", "config.json", "raymerge/run.json"]
    assert max(n for n, name in enumerate(order) if name.endswith(".safetensors")) < order.index("config.json")


def test_the_same_again_and_another(asked: dict[str, Any], storage: Storage) -> None:
    api.merge(asked, OUT, local=True)
    storage.written.clear()
    assert api.merge(asked, OUT, local=True).shards_resumed > 2
    assert not storage.written
    other = {**asked, "settings": {"coefficient": 0.1}}
    with pytest.raises(OutputError, match="is not the result of this recipe"):
        api.merge(other, OUT, local=True)
    assert api.merge(other, OUT, local=True, overwrite=True).shards_resumed == 0
    RemotePath("s3://models/mine/notes.txt").write_bytes(b"mine")
    with pytest.raises(OutputError, match="holds notes.txt, which RayMerge did not write"):
        api.merge(asked, "s3://models/mine", local=True, overwrite=True)


def test_a_merge_that_breaks_off_goes_on(asked: dict[str, Any], storage: Storage, tmp_path: Path) -> None:
    class Over(Exception):
        pass

    def stop(what: str, done: int, total: int) -> None:
        if what == "merging" and done == 2:
            raise Over

    with pytest.raises(Over):
        api.merge(asked, OUT, local=True, workers=1, progress=stop)
    names = RemotePath(OUT).files()
    assert "config.json" not in names and "raymerge/run.json" not in names
    # What a killed process may leave: a file that ends too early.
    broken = next(name for name in names if name.endswith(".safetensors"))
    (RemotePath(OUT) / broken).write_bytes((RemotePath(OUT) / broken).read_bytes()[:-1])
    done = sum(name.endswith(".safetensors") for name in names) - 1
    assert api.merge(asked, OUT, local=True).shards_resumed == done > 0
    api.merge(asked, tmp_path / "out", local=True)
    assert weights(storage.download(OUT, tmp_path / "copy")) == weights(tmp_path / "out")


def test_one_request_in_ten_fails(asked: dict[str, Any], storage: Storage, tmp_path: Path) -> None:
    storage.fail_every = 10
    api.merge(asked, OUT, local=True)
    assert storage.failed > 2
    storage.fail_every = 0
    api.merge(asked, tmp_path / "out", local=True)
    assert weights(storage.download(OUT, tmp_path / "copy")) == weights(tmp_path / "out")


def test_an_upload_that_fails_leaves_nothing(storage: Storage) -> None:
    place = RemotePath(f"{OUT}/model.safetensors")
    with pytest.raises(ZeroDivisionError), upload.open_upload(place, [("x", torch.float32, (4,))]) as writer:
        writer.write("x", 0, torch.zeros(2))
        raise ZeroDivisionError
    assert not place.is_file()
    with pytest.raises(StorageError, match="s3://no-such-bucket/out"):
        RemotePath("s3://no-such-bucket/out/config.json").write_bytes(b"{}")


def test_places_that_cannot_be(asked: dict[str, Any]) -> None:
    with pytest.raises(RayMergeError, match="a folder, s3:// or gs:// is expected"):
        api.merge(asked, "ftp://host/out", local=True)


@pytest.mark.slow
def test_a_distillation_and_its_model(storage: Storage, tmp_path: Path) -> None:
    """Experts from a storage that fails one request in ten, units, heads and coefficients to it; and back again."""
    asked = {**make_family(tmp_path, epochs=2), "output": {"coefficients": True}}
    api.merge(asked, tmp_path / "out", local=True)
    asked["base"] = storage.upload(Path(asked["base"]), "base")
    for name, expert in asked["experts"].items():
        expert["path"] = storage.upload(Path(expert["path"]), name)
    storage.fail_every = 10
    api.merge(asked, OUT, local=True)
    assert storage.failed > 2
    storage.fail_every = 0
    copy = storage.download(OUT, tmp_path / "copy")
    assert weights(copy) == weights(tmp_path / "out")
    assert not (copy / "raymerge" / "units").exists()
    coefficients = Path("raymerge", "coefficients.safetensors")
    assert (copy / coefficients).read_bytes() == (tmp_path / "out" / coefficients).read_bytes()
    there, here = raymerge.load_task_model(OUT, "a"), raymerge.load_task_model(tmp_path / "out", "a")
    assert all(torch.equal(value, here.state_dict()[name]) for name, value in there.state_dict().items())
    assert str(api.report(OUT)) == f"{OUT}/report.html"
    assert "Distillation" in (RemotePath(OUT) / "report.html").read_text()
    # Nothing of the weights was kept on this machine.
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


@pytest.mark.slow
def test_a_search(storage: Storage, tmp_path: Path) -> None:
    """With all of it on the storage, one request in ten to which fails; on a Ray that knows the storage."""
    asked = family(tmp_path, space=PER_EXPERT, trials=4, searcher="tpe")
    asked["base"] = storage.upload(Path(asked["base"]), "base")
    for name, expert in asked["experts"].items():
        expert["path"] = storage.upload(Path(expert["path"]), name)
    data = storage.upload(tmp_path, "rows")
    for task in (*asked["evaluate"], *asked["search"]["evaluate"]):
        task["data"] = f"{data}/{Path(task['data']).name}"
    (tmp_path / "recipe.json").write_text(json.dumps(asked))
    weights_of_a = (tmp_path / "a" / "model.safetensors").stat().st_size
    storage.served.clear()
    storage.fail_every = 10
    ended = command.raymerge("search", "recipe.json", OUT, "--json", cwd=tmp_path)
    storage.fail_every = 0
    assert ended.returncode == 0, ended.stderr
    # By all trials together, by the best one's merge and its report, and as an expert; nine times if by each trial.
    assert storage.bytes_served("/models/a/model.safetensors") < 6 * weights_of_a
    found = json.loads(ended.stdout)
    copy = storage.download(OUT, tmp_path / "copy")
    rows = pq.read_table(copy / "trials.parquet").to_pylist()
    assert len(rows) == 4 and all(row["error"] is None for row in rows)
    assert found["objectives"]["mean_score"] == max(row["mean_score"] for row in rows)
    assert found["test"]["mean"] == api.evaluate(f"{OUT}/merged", asked).mean
    assert not (copy / "journal").exists() and (copy / "report.html").is_file()
    api.merge(str(copy / "best.yml"), tmp_path / "again", local=True)
    assert weights(tmp_path / "again") == weights(copy / "merged")
