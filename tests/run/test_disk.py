"""A full disk, a limit on file sizes, a folder without permission: one readable error, and nothing that looks done."""

import json
import mmap
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from command import COMMAND, raymerge, run
from tiny import make_llama, recipe, weights

from raymerge import api
from raymerge.checkpoint.header import layout_bytes

PAGE = mmap.PAGESIZE


@pytest.fixture
def place(tmp_path: Path) -> Path:
    for seed, name in ((0, "base"), (1, "a")):
        make_llama(tmp_path / name, seed, hidden=64, blocks=4)
    content = recipe(tmp_path / "base", tmp_path / "a", output={"shard_size": 200_000})
    (tmp_path / "recipe.yml").write_text(json.dumps(content))
    return tmp_path


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, or skip where this user may not mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small file system needs root")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def resize(disk: Path, size: int) -> None:
    subprocess.run(["mount", "-o", f"remount,size={size}", disk], check=True)


def test_a_full_disk(place: Path, small_disk: Path) -> None:
    """Too small from the start; full on the way, for more than weights is written."""
    out = small_disk / "out"
    needed = sum(layout_bytes(shard.layout) for shard in api.plan(str(place / "recipe.yml")).shards)
    resize(small_disk, needed)
    found = raymerge("merge", place / "recipe.yml", out, "--local")
    assert found.returncode == 1 and re.search(r"GB are to be written, .* GB are free", found.stderr)
    assert not out.exists()
    resize(small_disk, needed + 3 * PAGE)
    found = raymerge("merge", place / "recipe.yml", out, "--local")
    assert found.returncode == 1
    assert "cannot be written: No space left on device" in found.stderr
    assert "free some space and run the same command again" in found.stderr
    assert "Traceback" not in found.stderr
    assert not out.exists()
    resize(small_disk, 20 * 2**20)
    again = raymerge("merge", place / "recipe.yml", out, "--local")
    assert again.returncode == 0, again.stderr
    assert "files were there" in again.stdout
    raymerge("merge", place / "recipe.yml", place / "expected", "--local")
    assert weights(out) == weights(place / "expected")


def test_a_limit_on_file_sizes(place: Path) -> None:
    limited = ["bash", "-c", 'ulimit -f 50; trap "" XFSZ; exec "$@"', "bash", *COMMAND]
    found = run([*limited, "merge", str(place / "recipe.yml"), str(place / "out"), "--local"])
    assert found.returncode == 1
    assert re.search("model-0000[0-9]-of-.* cannot be written: File too large", found.stderr)
    assert not (place / "out").exists()
