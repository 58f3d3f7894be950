"""Time a whole command, and watch the resident memory of every process it starts."""

import re
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Thread

import psutil


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """Wall time of a command from start to exit, and the most that any one of its processes held."""

    elapsed_seconds: float
    peak_bytes: int


def run_measured(command: Sequence[str], environment: dict[str, str] | None = None) -> Measured:
    """Run a command to its end. Raises CalledProcessError, with its output, if it fails."""
    begun = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
    peak, done = [0], Event()
    watcher = Thread(target=_watch, args=(process.pid, peak, done))
    watcher.start()
    output, _ = process.communicate()
    elapsed = time.perf_counter() - begun
    done.set()
    watcher.join()
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command, output)
    return Measured(elapsed_seconds=elapsed, peak_bytes=peak[0])


def _watch(pid: int, peak: list[int], done: Event) -> None:
    root = psutil.Process(pid)
    # The kernel keeps each process's own maximum, so it is enough to look shortly before one ends.
    while not done.wait(0.1):
        try:
            tree = [root, *root.children(recursive=True)]
        except psutil.NoSuchProcess:
            return
        for process in tree:
            try:
                status = Path(f"/proc/{process.pid}/status").read_text()
            except (FileNotFoundError, ProcessLookupError):
                continue
            found = re.search(r"VmHWM:\s+(\d+) kB", status)
            peak[0] = max(peak[0], int(found[1]) * 1024 if found else 0)
