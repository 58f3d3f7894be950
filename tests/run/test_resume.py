"""Killed at any moment, a merge is taken up again and gives the bytes of an undisturbed run."""

import json
import signal
from pathlib import Path
from typing import Any

import psutil
import pytest
from command import descendants, raymerge, started, wait
from tiny import make_llama, recipe, weights

from raymerge import api
from raymerge.errors import OutputError

# A private method of the user's: linear, and slow enough to be killed half-way.
SLOW = """
import os, time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from raymerge.methods.linear import Linear

@dataclass(frozen=True, kw_only=True, slots=True)
class Slow(Linear):
    seconds: float = 0.25

    def merge(self, base: Any, experts: Sequence[Any], *more: Any) -> Any:
        time.sleep(0 if Path("fast").exists() else self.seconds)
        return Linear.merge(self, base, experts, *more)
"""


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A working directory with two experts, a private method, and a recipe of several shards."""
    (tmp_path / "slow_method.py").write_text(SLOW)
    for seed, name in ((0, "base"), (1, "a"), (2, "b")):
        make_llama(tmp_path / name, seed, blocks=4)
    content = recipe(Path("base"), Path("a"), Path("b"), method="slow_method:Slow", output={"shard_size": 6000})
    (tmp_path / "recipe.yml").write_text(json.dumps(content))
    return tmp_path


def expected(place: Path) -> dict[str, bytes]:
    """The bytes of an undisturbed merge by the method that Slow is."""
    content = json.loads((place / "recipe.yml").read_text())
    content |= {"method": "linear", "settings": {}, "base": str(place / "base")}
    content["experts"] = {name: str(place / name) for name in content["experts"]}
    api.merge(content, place / "expected", local=True)
    return weights(place / "expected")


def shards(place: Path) -> list[str]:
    return sorted(path.name for path in (place / "out.partial").glob("*.safetensors"))


def test_a_killed_driver_is_followed_by_one_that_goes_on(place: Path) -> None:
    """With a method from the working directory, on Ray."""
    with started("merge", "recipe.yml", "out", "--workers", "2", cwd=place) as process:
        wait(lambda: len(shards(place)) >= 2, process)
        process.send_signal(signal.SIGKILL)
        process.wait()
        left = shards(place)
    assert left and not (place / "out").exists()
    before = {name: (place / "out.partial" / name).stat().st_mtime_ns for name in left}
    (place / "fast").write_text("")
    again = raymerge("merge", "recipe.yml", "out", cwd=place)
    assert again.returncode == 0, again.stderr
    facts = json.loads((place / "out" / "raymerge" / "run.json").read_text())
    assert facts["shards_resumed"] >= len(left) > 0
    assert len(facts["shards"]) + facts["shards_resumed"] == len(weights(place / "out"))
    for name, changed in before.items():
        assert (place / "out" / name).stat().st_mtime_ns == changed
    assert weights(place / "out") == expected(place)
    assert not [path for path in (place / "out").rglob("*") if path.name.endswith(".tmp") or path.name == ".lock"]
    assert not (place / "out.partial").exists()


def test_a_killed_driver_without_ray(place: Path) -> None:
    with started("merge", "recipe.yml", "out", "--local", "--workers", "1", cwd=place) as process:
        wait(lambda: len(shards(place)) >= 2, process)
        process.kill()
        process.wait()
    left = shards(place)
    (place / "fast").write_text("")
    again = raymerge("merge", "recipe.yml", "out", "--local", cwd=place)
    assert again.returncode == 0, again.stderr
    assert f"{len(left)} of {len(weights(place / 'out'))} files were there" in again.stdout
    assert weights(place / "out") == expected(place)


@pytest.mark.slow
def test_a_killed_worker_is_replaced(place: Path) -> None:
    # The driver merges alone until workers are there, and shall not be done by then.
    content = json.loads((place / "recipe.yml").read_text()) | {"settings": {"seconds": 2.0}}
    (place / "recipe.yml").write_text(json.dumps(content))
    with started("merge", "recipe.yml", "out", "--workers", "2", cwd=place) as process:
        wait(lambda: len(shards(place)) >= 1, process)
        wait(lambda: descendants(process.pid, "ray::_call"), process)
        for one in descendants(process.pid, "ray::_call"):
            one.kill()
        (place / "fast").write_text("")
        _, errors = process.communicate(timeout=90)
        assert process.returncode == 0, errors
    assert weights(place / "out") == expected(place)
    assert not list((place / "out").rglob("*.tmp"))


@pytest.mark.slow
def test_interrupted_it_stops_at_once(place: Path) -> None:
    """Whatever its workers do, and goes on by the same command."""
    content = json.loads((place / "recipe.yml").read_text()) | {"settings": {"seconds": 2.0}}
    (place / "recipe.yml").write_text(json.dumps(content))
    with started("merge", "recipe.yml", "out", "--workers", "2", cwd=place) as process:
        wait(lambda: descendants(process.pid, "ray::_call"), process)
        workers = descendants(process.pid, "ray::_call")
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=90)
        assert process.returncode == 130 and "stopped; the same command goes on from here" in errors
        left = psutil.wait_procs(workers, timeout=30)[1]
        # One that ended stays a zombie until its parent has looked.
        assert not [one for one in left if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]
    assert not (place / "out").exists() and (place / "out.partial").exists()
    (place / "fast").write_text("")
    again = raymerge("merge", "recipe.yml", "out", "--local", cwd=place)
    assert again.returncode == 0, again.stderr
    assert weights(place / "out") == expected(place)


def test_two_processes_on_one_output(place: Path) -> None:
    with started("merge", "recipe.yml", "out", "--local", "--workers", "1", cwd=place) as process:
        wait(lambda: shards(place), process)
        second = raymerge("merge", "recipe.yml", "out", "--local", cwd=place)
        assert second.returncode == 2
        assert "another process is writing it" in second.stderr
        assert "Traceback" not in second.stderr
        (place / "fast").write_text("")
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
    assert weights(place / "out") == expected(place)


# -- an output that is there


def family(folder: Path) -> dict[str, Any]:
    for seed, name in ((0, "base"), (1, "a")):
        make_llama(folder / name, seed)
    return recipe(folder / "base", folder / "a", output={"shard_size": 6000})


def stamps(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in sorted(folder.rglob("*"))}


def test_a_complete_output_is_not_made_again(tmp_path: Path) -> None:
    asked = family(tmp_path)
    first = api.merge(asked, tmp_path / "out", local=True)
    before = stamps(tmp_path / "out")
    again = api.merge(asked, tmp_path / "out", local=True)
    assert again.shards_resumed == len(first.plan.shards) and first.shards_resumed == 0
    assert again.peak_bytes == 0
    assert stamps(tmp_path / "out") == before


def test_another_recipe_does_not_touch_an_output(tmp_path: Path) -> None:
    asked = family(tmp_path)
    api.merge(asked, tmp_path / "out", local=True)
    before = stamps(tmp_path / "out")
    other = {**asked, "seed": 4}
    with pytest.raises(OutputError, match="exists and is not the result of this recipe"):
        api.merge(other, tmp_path / "out", local=True)
    assert stamps(tmp_path / "out") == before
    api.merge(other, tmp_path / "out", local=True, overwrite=True)
    assert json.loads((tmp_path / "out" / "raymerge" / "run.json").read_text())["seed"] == 4


def test_foreign_files_are_never_touched(tmp_path: Path) -> None:
    asked = family(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(OutputError, match="exists and"):
            api.merge(asked, tmp_path / "out", local=True, overwrite=overwrite)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["notes.txt"]
    assert not (tmp_path / "out.partial").exists()


def half_done(asked: dict[str, Any], out: Path) -> None:
    """Leave unfinished work, as a killed run does: the first tidings of progress end the run."""

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        api.merge(asked, out, local=True, workers=1, progress=stop)
    assert not out.exists() and list(out.with_name("out.partial").glob("*.safetensors"))


def test_unfinished_work_of_another_recipe_is_not_mixed_in(tmp_path: Path) -> None:
    asked = family(tmp_path)
    half_done(asked, tmp_path / "out")
    with pytest.raises(OutputError, match="unfinished work of another recipe or of inputs that have changed"):
        api.merge({**asked, "seed": 4}, tmp_path / "out", local=True)
    result = api.merge({**asked, "seed": 4}, tmp_path / "out", local=True, overwrite=True)
    assert result.shards_resumed == 0


def test_inputs_that_changed_are_not_mixed_in(tmp_path: Path) -> None:
    asked = family(tmp_path)
    half_done(asked, tmp_path / "out")
    make_llama(tmp_path / "a", 9)
    with pytest.raises(OutputError, match="inputs that have changed"):
        api.merge(asked, tmp_path / "out", local=True)


def test_a_shard_cut_short_is_made_again(tmp_path: Path) -> None:
    asked = family(tmp_path)
    half_done(asked, tmp_path / "out")
    whole = sorted((tmp_path / "out.partial").glob("*.safetensors"))
    whole[0].write_bytes(whole[0].read_bytes()[:100])
    (tmp_path / "out.partial" / "model-00001-of-00002.safetensors.abc.tmp").write_text("")
    result = api.merge(asked, tmp_path / "out", local=True)
    assert result.shards_resumed == len(whole) - 1
    api.merge(asked, tmp_path / "expected", local=True)
    assert weights(tmp_path / "out") == weights(tmp_path / "expected")
