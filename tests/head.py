"""A real Ray head with its dashboard, on loopback only, behind a token; started and ended by the test."""

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import Request, urlopen

import psutil
from command import descendants, environment

TOKEN = "token-of-this-test-only-0123456789abcdef"
LOOPBACK = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
# What a job takes to start and end on a machine that other tests share.
SECONDS = 180


class Head:
    """A running head; `environment` is for its clients."""

    def __init__(self, folder: Path, ports: list[int]) -> None:
        self.folder = folder
        self.address = f"http://127.0.0.1:{ports[0]}"
        self.environment = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}

    def ask(self, path: str) -> Any:
        """What the dashboard answers."""
        request = Request(f"{self.address}/api/{path}", headers={"Authorization": f"Bearer {TOKEN}"})
        with urlopen(request, timeout=30) as answer:
            return json.load(answer)

    def job(self, job: str) -> Any:
        return self.ask(f"jobs/{job}")

    def log(self, job: str) -> str:
        found: str = self.ask(f"jobs/{job}/logs")["logs"]
        return found

    def jobs(self) -> list[str]:
        """The ids of submitted jobs, the oldest first."""
        found = [one for one in self.ask("jobs/") if one["submission_id"]]
        return [one["submission_id"] for one in sorted(found, key=lambda one: int(one["start_time"]))]

    def ended(self, job: str) -> Any:
        """A job's facts once it has ended."""
        wait_for(lambda: self.job(job)["status"] not in ("PENDING", "RUNNING"))
        return self.job(job)


def wait_for(condition: Callable[[], Any]) -> None:
    end = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.2)


@contextmanager
def started_head(**more: str) -> Iterator[Head]:
    """A head with two cores and `more` in its environment."""
    # Not in pytest's folder: the path of a socket is at most 107 characters long.
    folder = Path(tempfile.mkdtemp(prefix="rm-", dir="/tmp"))
    ports = free_ports(5)
    head = Head(folder, ports)
    kinds = ("dashboard-port", "port", "dashboard-agent-listen-port", "ray-client-server-port", "metrics-export-port")
    command = [str(Path(sys.executable).parent / "ray"), "start", "--head", "--block", "--disable-usage-stats"]
    command += ["--num-cpus=2", f"--temp-dir={folder}", f"--object-store-memory={128 * 2**20}"]
    command += ["--include-dashboard=true", "--dashboard-host=127.0.0.1", "--node-ip-address=127.0.0.1"]
    command += [f"--{kind}={port}" for kind, port in zip(kinds, ports, strict=True)]
    # Jobs run `python`; what they know of RayMerge comes with them.
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    # By the last, which Ray means for other systems, all of it listens on loopback and nowhere else.
    variables = {**environment(PATH=path, **head.environment, **more), "PYTHONPATH": "", LOOPBACK: "0"}
    with (folder / "out").open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env=variables, cwd=folder)
    try:
        wait_for(lambda: process.poll() is not None or _answers(head))
        assert process.poll() is None, (folder / "out").read_text()
        yield head
    finally:
        family = descendants(process.pid)
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(20)
        process.kill()
        for one in family:
            with suppress(psutil.NoSuchProcess):
                one.kill()
        psutil.wait_procs(family, timeout=20)
        shutil.rmtree(folder, ignore_errors=True)


def _answers(head: Head) -> bool:
    try:
        return bool(head.ask("version"))
    except (URLError, OSError):
        return False


def free_ports(count: int) -> list[int]:
    """Ports of loopback that nobody has, all held at once so that no two are the same."""
    held = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in held]
    for one in held:
        one.close()
    return ports
