"""Killed outright, driver or worker, a distillation is taken up again and gives the bytes of an undisturbed run."""

import json
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from command import COMMAND, environment, raymerge
from samples import make_family
from tiny import weights

FIRST = "out.partial/raymerge/units/encoder.layer.0.json"


def prepare(folder: Path, **compute: Any) -> None:
    asked = {**make_family(folder, epochs=40), "compute": compute}
    (folder / "recipe.yml").write_text(json.dumps(asked))


def start(folder: Path, *more: str) -> subprocess.Popen[str]:
    command = [*COMMAND, "merge", "recipe.yml", "out", *more]
    return subprocess.Popen(command, cwd=folder, env=environment(), stderr=subprocess.PIPE, text=True)


def wait(condition: Callable[[], Any], process: subprocess.Popen[str], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None and time.monotonic() < end, process.communicate()
        time.sleep(0.02)


def test_a_killed_run(tmp_path: Path) -> None:
    prepare(tmp_path)
    process = start(tmp_path, "--local")
    wait((tmp_path / FIRST).is_file, process, 90)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "out").exists()
    begun = (tmp_path / FIRST).stat().st_mtime_ns
    again = start(tmp_path, "--local")
    wait(lambda: (tmp_path / "out.partial/raymerge/units/encoder.layer.1.json").is_file(), again, 90)
    assert (tmp_path / FIRST).stat().st_mtime_ns == begun
    _, said = again.communicate(timeout=90)
    assert again.returncode == 0, said
    assert "encoder.layer.1 (2 of 3): loss" in said and "encoder.layer.0 (1 of 3)" not in said
    assert raymerge("merge", "recipe.yml", "expected", "--local", cwd=tmp_path).returncode == 0
    assert weights(tmp_path / "out") == weights(tmp_path / "expected")


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_killed_worker(tmp_path: Path) -> None:
    """Ray Train starts the group again."""
    prepare(tmp_path, workers=2, zero_stage=2)
    process = start(tmp_path)
    wait((tmp_path / FIRST).is_file, process, 180)

    def workers() -> list[psutil.Process]:
        family = psutil.Process(process.pid).children(recursive=True)
        return [one for one in family if "RayTrainWorker" in " ".join(one.cmdline())]

    workers()[0].send_signal(signal.SIGKILL)
    _, said = process.communicate(timeout=240)
    assert process.returncode == 0, said
    assert raymerge("merge", "recipe.yml", "expected", cwd=tmp_path).returncode == 0
    assert weights(tmp_path / "out") == weights(tmp_path / "expected")
