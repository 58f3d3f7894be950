"""The Slurm script with stand-ins for `srun` and `scontrol`: what goes wrong, and a real Ray of two nodes."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml
from command import descendants, environment
from tiny import make_llama, recipe, weights

from raymerge import api

SCRIPT = Path(__file__).parent.parent.parent / "cluster" / "slurm.sh"

SCONTROL = """#!/bin/sh
case "$*" in
    "show hostnames node[1-2]") printf 'node1\\nnode2\\n' ;;
    "show hostnames node1") echo node1 ;;
    *) exit 1 ;;
esac
"""
# What some systems give a node's own name.
GETENT = """#!/bin/sh
echo 127.0.1.1 STREAM node1
"""
# A node is an address of this machine. What it was given of the token is written down.
SRUN = """#!/bin/sh
while true; do
    case "$1" in
        --nodelist=*) node=${1#*=} ;;
        --*) ;;
        *) break ;;
    esac
    shift
done
echo "$node $RAY_AUTH_MODE $(stat -c %a "$RAY_AUTH_TOKEN_PATH") $(wc -c < "$RAY_AUTH_TOKEN_PATH")" >> "$SRUN_LOG"
[ "$node" = node2 ] && set -- "$@" --node-ip-address=127.0.0.3
"""
# Linear; the process of the command leaves its work to Ray, whose nodes wait until both have some.
METHOD = """
import os, time
from pathlib import Path
import psutil
from raymerge.methods.linear import Linear
from raymerge.run import cluster

class Meeting(Linear):
    def merge(self, base, experts, *more):
        cluster._ready.wait(60)
        raylet = psutil.Process(os.getppid())
        met = Path(os.environ["MET"])
        if raylet.name() == "raylet":
            (met / str(raylet.pid)).touch()
            end = time.monotonic() + 60
            while len(list(met.iterdir())) < 2 and time.monotonic() < end:
                time.sleep(0.1)
        return super().merge(base, experts, *more)
"""


class Job:
    """The script as Slurm runs it, in a folder with a home of its own; `srun` ends in `then`."""

    def __init__(self, folder: Path, *arguments: str, then: str = 'exec "$@"', **more: str) -> None:
        tools = folder / "tools"
        tools.mkdir()
        (folder / "home").mkdir()
        for name, text in (("scontrol", SCONTROL), ("getent", GETENT), ("srun", f"{SRUN}{then}\n")):
            (tools / name).write_text(text)
            (tools / name).chmod(0o755)
        self.home = folder / "home"
        self.log = folder / "srun.log"
        self._said = folder / "out.txt", folder / "err.txt"
        asked = {
            "SLURM_JOB_NODELIST": "node[1-2]",
            "RAYMERGE_HEAD_ADDRESS": "127.0.0.2",
            "SRUN_LOG": str(self.log),
            "HOME": str(self.home),
            "PATH": f"{tools}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        }
        with self._said[0].open("w") as out, self._said[1].open("w") as err:
            self.process = subprocess.Popen(
                ["bash", str(SCRIPT), *arguments],
                cwd=folder,
                env=environment(**(asked | more)),
                stdout=out,
                stderr=err,
            )

    def end(self, seconds: float = 30) -> tuple[int, str, str]:
        """Wait for the end; all that the script has started is gone with it, and so is the token."""
        family: dict[int, psutil.Process] = {}
        end = time.monotonic() + seconds
        try:
            while self.process.poll() is None:
                family |= {one.pid: one for one in descendants(self.process.pid)}
                assert time.monotonic() < end, "it did not end"
                time.sleep(0.1)
            _, alive = psutil.wait_procs(family.values(), timeout=20)
            assert not alive
        finally:
            self.process.kill()
            for one in family.values():
                if one.is_running():
                    one.kill()
        assert not list(self.home.glob(".raymerge-token*"))
        out, err = (path.read_text() for path in self._said)
        return self.process.wait(), out, err


@pytest.mark.parametrize(
    ("arguments", "more", "said"),
    [
        ((), {}, "no command"),
        (("plan", "r.yml"), {"SLURM_JOB_NODELIST": ""}, "this is not a Slurm job"),
        (
            ("plan", "r.yml"),
            {"RAYMERGE_HEAD_ADDRESS": ""},
            "node1 has address '127.0.1.1' here; set RAYMERGE_HEAD_ADDRESS",
        ),
        (("plan", "r.yml"), {"RAYMERGE_START_SECONDS": "1"}, "0 of 2 nodes have joined 127.0.0.2:"),
    ],
)
def test_an_error_says_what_is_missing(
    tmp_path: Path, arguments: tuple[str, ...], more: dict[str, str], said: str
) -> None:
    code, _, err = Job(tmp_path, *arguments, then="exec sleep 60", **more).end()
    assert code == 1
    assert said in err


def test_a_node_whose_ray_ends_is_not_waited_for(tmp_path: Path) -> None:
    code, _, err = Job(tmp_path, "plan", "r.yml", then="echo no memory >&2; exit 1").end()
    assert code == 1
    assert "no memory" in err
    assert "Ray has ended on a node" in err


def test_the_time_limit_of_slurm_leaves_nothing_behind(tmp_path: Path) -> None:
    job = Job(tmp_path, "plan", "r.yml", then="exec sleep 60")
    while not job.log.exists():
        assert job.process.poll() is None
        time.sleep(0.05)
    job.process.send_signal(signal.SIGTERM)
    code, _, _ = job.end()
    assert code == 143


@pytest.fixture
def asked(tmp_path: Path) -> Path:
    base, math, code = (make_llama(tmp_path / name, seed) for seed, name in enumerate(("base", "math", "code")))
    path = tmp_path / "r.yml"
    path.write_text(yaml.safe_dump(recipe(base, math, code, output={"shard_size": 4000})))
    return path


def test_on_a_single_node_the_command_is_left_to_itself(tmp_path: Path, asked: Path) -> None:
    job = Job(tmp_path, "merge", "r.yml", "out", "--local", SLURM_JOB_NODELIST="node1")
    code, out, err = job.end()
    assert code == 0, err
    assert "linear of 3 checkpoints" in out
    assert not job.log.exists()


def test_a_failed_command_fails_the_job(tmp_path: Path, asked: Path) -> None:
    asked.write_text(asked.read_text().replace("linear", "linnear"))
    code, _, err = Job(tmp_path, "plan", "r.yml", SLURM_JOB_NODELIST="node1").end()
    assert code == 2
    assert "did you mean 'linear'" in err


@pytest.mark.slow
def test_a_merge_on_two_nodes(tmp_path: Path, asked: Path) -> None:
    api.merge(asked, tmp_path / "local", local=True)
    before = set(Path("/tmp").glob("ray.*"))
    (tmp_path / "private.py").write_text(METHOD)
    met = tmp_path / "met"
    met.mkdir()
    asked.write_text(asked.read_text().replace("linear", "private:Meeting"))
    job = Job(tmp_path, "merge", "r.yml", "out", MET=str(met), PYTHONPATH=f"{SCRIPT.parent.parent}:{tmp_path}")
    code, out, err = job.end(240)
    assert code == 0, err
    assert "slurm.sh: Ray runs on 2 nodes" in out
    # 32 random bytes in hexadecimal, that only their owner reads.
    assert job.log.read_text().splitlines() == ["node1 token 600 64", "node2 token 600 64"]
    assert len(list(met.iterdir())) == 2
    assert weights(tmp_path / "out") == weights(tmp_path / "local")
    assert set(Path("/tmp").glob("ray.*")) <= before
