"""Run the `raymerge` command, or a piece of Python, as users do: in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
COMMAND = (sys.executable, "-c", "from raymerge.cli import main; main()")


def environment(**more: str) -> dict[str, str]:
    found = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200", **more}
    found.pop("RAY_ADDRESS", None)
    return found


def raymerge(*arguments: str | Path, cwd: Path | None = None, **more: str) -> subprocess.CompletedProcess[str]:
    """The command with these arguments; `more` is added to its environment."""
    return run([*COMMAND, *map(str, arguments)], cwd=cwd, **more)


def python(text: str, *arguments: str | Path, cwd: Path | None = None, **more: str) -> subprocess.CompletedProcess[str]:
    return run([sys.executable, "-c", text, *map(str, arguments)], cwd=cwd, **more)


def run(command: list[str], *, cwd: Path | None = None, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=cwd, env=environment(**more), capture_output=True, text=True, timeout=120, check=False
    )
