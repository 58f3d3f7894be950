"""Run the `raymerge` command, or a piece of Python, as users do: in a process of its own."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parent.parent
HANGS_SECONDS = 400
# Ctrl-C works as in a terminal, also where the tests run in the background of a shell.
_AS_IN_A_TERMINAL = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
COMMAND = (sys.executable, "-c", f"{_AS_IN_A_TERMINAL}; from raymerge.cli import main; main()")


def environment(**more: str) -> dict[str, str]:
    """This process's own, for RayMerge on a Ray of its own unless `more` has RAY_ADDRESS."""
    found = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    found.pop("RAY_ADDRESS", None)
    return found | more


def raymerge(*arguments: str | Path, cwd: Path | None = None, **more: str) -> subprocess.CompletedProcess[str]:
    """The command with these arguments; `more` is added to its environment."""
    return run([*COMMAND, *map(str, arguments)], cwd=cwd, **more)


def python(text: str, *arguments: str | Path, cwd: Path | None = None, **more: str) -> subprocess.CompletedProcess[str]:
    return run([sys.executable, "-c", text, *map(str, arguments)], cwd=cwd, **more)


def run(command: list[str], *, cwd: Path | None = None, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=cwd, env=environment(**more), capture_output=True, text=True, timeout=HANGS_SECONDS, check=False
    )


@contextmanager
def started(*arguments: str, cwd: Path, **more: str) -> Iterator[subprocess.Popen[str]]:
    """The command in the background, ended with all it started when the test is done."""
    process = subprocess.Popen(
        [*COMMAND, *arguments],
        cwd=cwd,
        env=environment(**more),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        family = descendants(process.pid)
        process.kill()
        process.communicate()
        for one in family:
            if one.is_running():
                one.kill()


def wait(condition: Callable[[], Any], process: subprocess.Popen[str], seconds: float = 180) -> None:
    """Return when the condition holds; fail if the process has ended, or the time is over."""
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.02)


def descendants(pid: int, title: str = "") -> list[psutil.Process]:
    """Processes that one has started, in turn too, whose command line has `title` in it."""
    try:
        return [one for one in psutil.Process(pid).children(recursive=True) if title in _title(one)]
    except psutil.NoSuchProcess:
        return []


def listening() -> set[str]:
    """The addresses that this process and its descendants listen on."""
    found = set()
    for one in (psutil.Process(), *descendants(os.getpid())):
        # Some end meanwhile.
        with suppress(psutil.Error):
            found |= {each.laddr.ip for each in one.net_connections("tcp") if each.status == "LISTEN"}
    return {address.removeprefix("::ffff:") for address in found}


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""
