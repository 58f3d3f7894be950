"""Checkpoints on the hub, against a stand-in: plans read headers only, merges give the bytes of a local folder."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from command import raymerge
from hub import Hub, serve
from tiny import make_llama, weights

# Large against a header and the blocks it is read by.
SHAPE = {"hidden": 128, "blocks": 4, "rows": 512, "dtype": torch.float32, "tied": True}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub")
    make_llama(folder / "base", **SHAPE)
    make_llama(folder / "old", 1, files=2, **SHAPE)
    make_llama(folder / "new", 2, files=2, **SHAPE)
    return folder


@pytest.fixture
def hub(folders: Path) -> Iterator[Hub]:
    with serve(
        {"org/base": {"main": folders / "base"}, "org/math": {"main": folders / "new", "v1": folders / "old"}}
    ) as found:
        yield found


def write_recipe(path: Path, base: str, math: str) -> Path:
    content = {
        "base": base,
        "experts": {"math": math},
        "method": "task_arithmetic",
        "settings": {"coefficient": 0.5},
    }
    path.write_text(json.dumps(content))
    return path


def online(hub: Hub, home: Path) -> dict[str, str]:
    return {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_TELEMETRY": "1"}


def test_a_plan_reads_headers_and_a_merge_the_files(hub: Hub, folders: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "hub.yml", "org/base", "org/math@v1")
    settings = online(hub, tmp_path / "home")
    planned = raymerge("plan", recipe, "--json", **settings)
    assert planned.returncode == 0, planned.stderr
    summary = json.loads(planned.stdout)
    assert [model["place"] for model in summary["models"]] == [
        f"org/base@{hub.commit(folders / 'base')}",
        f"org/math@{hub.commit(folders / 'old')}",
    ]
    for name in ("base", "old"):
        for file in (folders / name).glob("*.safetensors"):
            repository = "org/base" if name == "base" else "org/math"
            assert 0 < hub.bytes_served(f"{repository}/{file.name}") < file.stat().st_size / 4
    assert not list((tmp_path / "home").rglob("*.safetensors"))

    merged = raymerge("merge", recipe, tmp_path / "out", "--local", **settings)
    assert merged.returncode == 0, merged.stderr
    assert list((tmp_path / "home").rglob("*.safetensors"))
    local = write_recipe(tmp_path / "local.yml", str(folders / "base"), str(folders / "old"))
    raymerge("merge", local, tmp_path / "expected", "--local")
    assert weights(tmp_path / "out") == weights(tmp_path / "expected")
    facts = json.loads((tmp_path / "out" / "raymerge" / "run.json").read_text())
    assert facts["inputs"][1]["place"] == f"org/math@{hub.commit(folders / 'old')}"
    assert "- org/math" in (tmp_path / "out" / "README.md").read_text()

    # Everything is in the cache now: the same plan from files, and no byte of weights again, even offline.
    served = len(hub.served)
    again = raymerge("plan", recipe, "--json", **settings)
    assert json.loads(again.stdout)["digest"] == summary["digest"]
    assert not [path for path, _ in hub.served[served:] if path.endswith(".safetensors")]
    offline = raymerge("plan", recipe, "--json", **settings | {"HF_HUB_OFFLINE": "1"})
    assert offline.returncode == 0, offline.stderr
    assert json.loads(offline.stdout)["digest"] == summary["digest"]


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("org/nothing", "org/nothing: no such folder, and the hub has no such repository for you"),
        ("org/math@v9", "org/math@v9: no such folder, and"),
    ],
)
def test_what_the_hub_does_not_have(hub: Hub, tmp_path: Path, place: str, said: str) -> None:
    recipe = write_recipe(tmp_path / "r.yml", "org/base", place)
    found = raymerge("plan", recipe, **online(hub, tmp_path / "home"))
    assert found.returncode == 2
    assert said in found.stderr
    assert "Traceback" not in found.stderr


def test_a_hub_that_does_not_answer(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "r.yml", "org/base", "org/math")
    found = raymerge("plan", recipe, HF_ENDPOINT="http://127.0.0.1:9", HF_HOME=str(tmp_path), HF_HUB_OFFLINE="0")
    assert found.returncode == 2
    assert "the hub did not answer" in found.stderr
    assert "Traceback" not in found.stderr
