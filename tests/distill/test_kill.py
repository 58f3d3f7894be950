"""Killed outright, driver or worker, a distillation is taken up again and gives the bytes of an undisturbed run."""

import json
import signal
from pathlib import Path
from typing import Any

import pytest
from command import descendants, raymerge, started, wait
from samples import make_family
from tiny import weights

UNITS = "out.partial/raymerge/units"
MERGE = ("merge", "recipe.yml", "out")


def prepare(folder: Path, **compute: Any) -> None:
    asked = {**make_family(folder, epochs=40), "compute": compute}
    (folder / "recipe.yml").write_text(json.dumps(asked))


def expected(folder: Path, *more: str) -> dict[str, bytes]:
    found = raymerge("merge", "recipe.yml", "expected", *more, cwd=folder)
    assert found.returncode == 0, found.stderr
    return weights(folder / "expected")


@pytest.mark.slow
def test_a_killed_run(tmp_path: Path) -> None:
    prepare(tmp_path)
    first, second = (tmp_path / UNITS / f"encoder.layer.{block}.json" for block in (0, 1))
    with started(*MERGE, "--local", cwd=tmp_path) as process:
        # What is not learned has a file, and the first block.
        wait(lambda: len(list((tmp_path / "out.partial").glob("*.safetensors"))) >= 2, process)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not (tmp_path / "out").exists()
    begun = first.stat().st_mtime_ns
    with started(*MERGE, "--local", cwd=tmp_path) as again:
        wait(second.is_file, again)
        assert first.stat().st_mtime_ns == begun
        _, said = again.communicate(timeout=90)
    assert again.returncode == 0, said
    assert "encoder.layer.1 (2 of 3): loss" in said and "encoder.layer.0 (1 of 3)" not in said
    assert weights(tmp_path / "out") == expected(tmp_path, "--local")


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_killed_worker(tmp_path: Path) -> None:
    """Ray Train starts the group again."""
    prepare(tmp_path, workers=2, zero_stage=2)
    with started(*MERGE, cwd=tmp_path) as process:
        wait((tmp_path / UNITS / "encoder.layer.0.json").is_file, process, seconds=180)
        descendants(process.pid, "RayTrainWorker")[0].kill()
        _, said = process.communicate(timeout=240)
    assert process.returncode == 0, said
    assert weights(tmp_path / "out") == expected(tmp_path)
