"""Several machines on one: a head and two workers with addresses and disks of their own, and S3 between them.

Where this machine does not let itself be divided (no root, no network namespaces), ray.cluster_utils stands in:
tests/run/test_nodes.py runs real raylets on one address and one disk.
"""

import json
import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from command import COMMAND, ROOT, environment, raymerge, wait
from run.test_resume import SLOW
from samples import make_family
from storage import BUCKET, Storage
from tiny import make_llama, recipe, weights

from raymerge import api

pytest.importorskip("moto")

NETNS = str(ROOT / "cluster" / "netns.sh")
HEAD = "10.77.0.1"


def is_divisible() -> bool:
    """Network namespaces may be made here."""
    if os.geteuid():
        return False
    try:
        made = subprocess.run(["ip", "netns", "add", "raymerge-try"], capture_output=True, check=False)
        subprocess.run(["ip", "netns", "delete", "raymerge-try"], capture_output=True, check=False)
    except OSError:
        return False
    return made.returncode == 0


pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(400),
    pytest.mark.skipif(
        not is_divisible(), reason="no network namespaces here: ray.cluster_utils stands in, in test_nodes.py"
    ),
]


class Machines:
    """`disk` is the folder that is another one on each machine; `run` starts a command on one of them."""

    def __init__(self, disk: Path, environment: dict[str, str]) -> None:
        self.disk = disk
        self.environment = environment

    def run(self, machine: int, *command: str | Path, cwd: Path | None = None, **more: Any) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [NETNS, "run", str(machine), *map(str, command)],
            cwd=cwd,
            env=self.environment,
            stdout=more.pop("stdout", subprocess.PIPE),
            stderr=more.pop("stderr", subprocess.STDOUT),
            text=True,
            **more,
        )

    def raymerge(self, *arguments: str, cwd: Path) -> subprocess.Popen[str]:
        """The command, on the head."""
        return self.run(1, *COMMAND, *arguments, cwd=cwd)

    def ray(self, machine: int, *arguments: str) -> subprocess.Popen[str]:
        """A node with one CPU, as long as the process lives."""
        address = f"--node-ip-address=10.77.0.{machine}"
        own = ("-m", "ray.scripts.scripts", "start", address, "--num-cpus=1", "--block", "--disable-usage-stats")
        return self.run(machine, sys.executable, *own, *arguments, stdout=subprocess.DEVNULL)

    def kill(self, machine: int) -> None:
        """All that runs on a machine is gone at once; its address no longer answers."""
        for pid in subprocess.run(
            ["ip", "netns", "pids", f"raymerge{machine}"], capture_output=True, text=True, check=True
        ).stdout.split():
            if psutil.pid_exists(int(pid)) and psutil.Process(int(pid)).name() != "sleep":
                os.kill(int(pid), signal.SIGKILL)


@contextmanager
def divided(disk: Path) -> Iterator[Machines]:
    """Three machines with a Ray node each, and an S3 server on the first."""
    names = Storage(f"http://{HEAD}:5000").environment
    names |= {"RAYMERGE_DISK": str(disk), "RAY_ADDRESS": f"{HEAD}:6379", "XDG_CACHE_HOME": f"{disk}/cache"}
    names |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    found = Machines(disk, environment(**names))
    subprocess.run([NETNS, "up", "3"], env=found.environment, check=True, timeout=60)
    try:
        found.ray(1, "--head", "--port=6379", "--include-dashboard=false", f"--temp-dir={disk}/ray")
        join(found, 2)
        join(found, 3)
        yield found
    finally:
        subprocess.run([NETNS, "down"], check=False, timeout=60, capture_output=True)


def join(machines: Machines, machine: int) -> None:
    """Start a worker when the head answers, and wait until it is there."""
    looks = f"""
import socket, subprocess, time
end = time.monotonic() + 90
while True:
    try:
        socket.create_connection(("{HEAD}", 6379), timeout=1).close()
        break
    except OSError:
        assert time.monotonic() < end, "the head does not answer"
        time.sleep(0.2)
"""
    assert machines.run(machine, sys.executable, "-c", looks).wait(100) == 0
    machines.ray(machine, f"--address={HEAD}:6379")
    counts = f"""
import time, ray
ray.init(address="{HEAD}:6379", log_to_driver=False)
end = time.monotonic() + 90
while not any(node["Alive"] and node["NodeManagerAddress"] == "10.77.0.{machine}" for node in ray.nodes()):
    assert time.monotonic() < end, "the node does not join"
    time.sleep(0.2)
"""
    process = machines.run(1, sys.executable, "-c", counts)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 0, said


@pytest.fixture(scope="module")
def machines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machines]:
    # Ray's sockets need a short path.
    disk = Path("/tmp/raymerge-disk")
    disk.mkdir(exist_ok=True)
    with divided(disk) as found:
        yield found


class Bucket:
    """The S3 server of a test, on the head: what is put there, and what was read."""

    def __init__(self, machines: Machines, note: Path) -> None:
        self._machines = machines
        self._note = note
        self._server = machines.run(
            1, sys.executable, ROOT / "tests" / "storage.py", HEAD, "5000", note, stdin=subprocess.PIPE, stderr=None
        )
        assert self._server.stdout is not None and self._server.stdout.readline() == "ready\n"

    def put(self, folder: Path, name: str) -> str:
        self._copy(folder, f"s3://{BUCKET}/{name}")
        return f"s3://{BUCKET}/{name}"

    def get(self, place: str, folder: Path) -> Path:
        self._copy(place, folder)
        return folder

    def names(self, prefix: str) -> list[str]:
        """What is there under a prefix."""
        listing = "import sys; from raymerge.checkpoint.place import RemotePath as P; print(*P(sys.argv[1]).files())"
        place, _, start = prefix.partition("/")
        found, _ = self._machines.run(1, sys.executable, "-c", listing, f"s3://{BUCKET}/{place}").communicate(
            timeout=60
        )
        return [name for name in found.split() if name.startswith(start)]

    def _copy(self, source: Path | str, target: Path | str) -> None:
        copy = """
import sys
from pyarrow import fs
from raymerge.checkpoint.remote import open_filesystem
(here, source), (there, target) = (
    open_filesystem(p) if "://" in p else (fs.LocalFileSystem(), p) for p in sys.argv[1:]
)
fs.copy_files(source, target, source_filesystem=here, destination_filesystem=there)
"""
        process = self._machines.run(1, sys.executable, "-c", copy, source, target)
        said, _ = process.communicate(timeout=60)
        assert process.returncode == 0, said

    def close(self) -> list[tuple[str, int]]:
        """End it; returns path and bytes of all that was read."""
        self._server.communicate("", timeout=30)
        found: list[tuple[str, int]] = json.loads(self._note.read_text())
        return found


@pytest.fixture
def bucket(machines: Machines, tmp_path: Path) -> Iterator[Bucket]:
    found = Bucket(machines, tmp_path / "served.json")
    yield found
    found.close()


def upload(asked: dict[str, Any], bucket: Bucket) -> dict[str, Any]:
    """The same recipe with its checkpoints on the storage."""

    def moved(expert: Any) -> Any:
        if isinstance(expert, str):
            return bucket.put(Path(expert), Path(expert).name)
        return {**expert, "path": bucket.put(Path(expert["path"]), Path(expert["path"]).name)}

    experts = {name: moved(expert) for name, expert in asked["experts"].items()}
    return {**asked, "base": moved(asked["base"]), "experts": experts}


def merge(machines: Machines, asked: dict[str, Any], out: str, place: Path) -> subprocess.Popen[str]:
    (place / "recipe.json").write_text(json.dumps(asked))
    return machines.raymerge("merge", "recipe.json", out, cwd=place)


def slow_family(folder: Path) -> dict[str, Any]:
    """A merge of several files that takes longer than Ray needs to have its processes ready."""
    (folder / "slow_method.py").write_text(SLOW)
    places = [make_llama(folder / name, seed, blocks=4) for seed, name in enumerate(("base", "a", "b"))]
    return recipe(*places, method="slow_method:Slow", output={"shard_size": 6000}, settings={"seconds": 0.5})


def test_every_byte_is_read_once(machines: Machines, bucket: Bucket, tmp_path: Path) -> None:
    places = [make_llama(tmp_path / name, seed, blocks=4) for seed, name in enumerate(("base", "a", "b"))]
    asked = recipe(*places, method="task_arithmetic", output={"shard_size": 6000})
    process = merge(machines, upload(asked, bucket), f"s3://{BUCKET}/out", tmp_path)
    said, _ = process.communicate(timeout=200)
    assert process.returncode == 0, said
    api.merge(asked, tmp_path / "expected", local=True)
    assert weights(bucket.get(f"s3://{BUCKET}/out", tmp_path / "copy")) == weights(tmp_path / "expected")
    held = sum(path.stat().st_size for path in places[1].glob("*.safetensors"))
    read = sum(count for path, count in bucket.close() if path.startswith(f"/{BUCKET}/a/model"))
    # Beside the weights their header, by the planner: less than a twentieth here.
    assert 0.9 * held < read < 1.2 * held
    for machine in (1, 2, 3):
        found, _ = machines.run(machine, "find", str(machines.disk), "-name", "*.safetensors").communicate()
        assert not found


def test_a_folder_that_only_one_machine_has(machines: Machines, bucket: Bucket, tmp_path: Path) -> None:
    process = merge(machines, upload(slow_family(tmp_path), bucket), f"{machines.disk}/out", tmp_path)
    said, _ = process.communicate(timeout=200)
    assert process.returncode == 1, said
    assert "does not see it; use a folder that is mounted at this path on every node, or s3://" in said
    assert machines.run(1, "ls", f"{machines.disk}/out").wait(10) != 0


def check(asked: dict[str, Any], bucket: Bucket, folder: Path) -> None:
    """What lies in the bucket's `out` has the bytes of a run on this machine alone."""
    (folder / "here.json").write_text(json.dumps(asked))
    here = raymerge("merge", "here.json", "expected", cwd=folder)
    assert here.returncode == 0, here.stderr
    assert weights(bucket.get(f"s3://{BUCKET}/out", folder / "copy")) == weights(folder / "expected")


def test_samples_from_stage_to_stage(machines: Machines, bucket: Bucket, tmp_path: Path) -> None:
    """On two machines, which share nothing but the storage."""
    asked = {**make_family(tmp_path, epochs=4), "compute": {"workers": 2, "stages": 2}}
    process = merge(machines, upload(asked, bucket), f"s3://{BUCKET}/out", tmp_path)
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said
    check(asked, bucket, tmp_path)


def test_gradients_between_machines_and_a_full_disk(machines: Machines, bucket: Bucket, tmp_path: Path) -> None:
    """The error says which disk, and what; with room there the same command goes on."""
    asked = {**make_family(tmp_path, epochs=4), "compute": {"workers": 2, "zero_stage": 2}}
    there = upload(asked, bucket)
    cache = f"{machines.disk}/cache"
    # Disks without room for one more file, of which one at least belongs to a worker.
    full = f"mkdir -p {cache} && mount -t tmpfs -o nr_inodes=1 tmpfs {cache}"
    for machine in (2, 3):
        assert machines.run(machine, "sh", "-c", full).wait(10) == 0
    process = merge(machines, there, f"s3://{BUCKET}/out", tmp_path)
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 1 and cache in said and "No space left on device" in said, said
    assert "config.json" not in bucket.names("out/")
    for machine in (2, 3):
        assert machines.run(machine, "umount", cache).wait(10) == 0
    process = merge(machines, there, f"s3://{BUCKET}/out", tmp_path)
    said, _ = process.communicate(timeout=200)
    assert process.returncode == 0, said
    check(asked, bucket, tmp_path)


def test_a_machine_that_is_lost(machines: Machines, bucket: Bucket, tmp_path: Path) -> None:
    """The last of the tests: it has one machine less afterwards."""
    asked = slow_family(tmp_path)
    process = merge(machines, upload(asked, bucket), f"s3://{BUCKET}/out", tmp_path)
    wait(lambda: len(bucket.names("out/model")) >= 2, process, seconds=100)
    machines.kill(3)
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said
    api.merge({**asked, "method": "linear", "settings": {}}, tmp_path / "expected", local=True)
    assert weights(bucket.get(f"s3://{BUCKET}/out", tmp_path / "copy")) == weights(tmp_path / "expected")
