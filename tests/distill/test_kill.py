"""Killed outright, a distillation goes on and gives the bytes of one that was not. Its workers: test_nodes.py."""

import json
import signal
from pathlib import Path

import pytest
from command import raymerge, started, wait
from samples import make_family
from tiny import weights

UNITS = "out.partial/raymerge/units"
MERGE = ("merge", "recipe.yml", "out", "--local")


@pytest.mark.slow
def test_a_killed_run(tmp_path: Path) -> None:
    (tmp_path / "recipe.yml").write_text(json.dumps(make_family(tmp_path, epochs=40)))
    first, second = (tmp_path / UNITS / f"encoder.layer.{block}.json" for block in (0, 1))
    with started(*MERGE, cwd=tmp_path) as process:
        # What is not learned has a file, and the first block.
        wait(lambda: len(list((tmp_path / "out.partial").glob("*.safetensors"))) >= 2, process)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not (tmp_path / "out").exists()
    begun = first.stat().st_mtime_ns
    with started(*MERGE, cwd=tmp_path) as again:
        wait(second.is_file, again)
        assert first.stat().st_mtime_ns == begun
        _, said = again.communicate(timeout=90)
    assert again.returncode == 0, said
    assert "encoder.layer.1 (2 of 3): loss" in said and "encoder.layer.0 (1 of 3)" not in said
    undisturbed = raymerge("merge", "recipe.yml", "expected", "--local", cwd=tmp_path)
    assert undisturbed.returncode == 0, undisturbed.stderr
    assert weights(tmp_path / "out") == weights(tmp_path / "expected")
