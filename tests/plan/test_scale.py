"""A plan of a hundred thousand tensors in a thousand files, from their headers: all of it, in bounded memory."""

import json
from pathlib import Path

import pytest
import torch
from command import python
from tiny import recipe

from raymerge.checkpoint.header import build_header

NAMES = ("base", "a", "b", "c", "d", "e", "f", "g", "h")
FILES, BLOCKS = 112, 100

PLANNED = """
import json, sys
from raymerge import api
from raymerge.plan.execute import peak_bytes
planned = api.plan(json.loads(sys.argv[1]))
assert planned.digest
cost = planned.cost
print(json.dumps([planned.num_tensors, cost.bytes_read, cost.bytes_written, peak_bytes()]))
"""


def write(folder: Path) -> None:
    """A checkpoint of which only headers are there; the weights are holes."""
    folder.mkdir()
    weight_map = {}
    for number in range(FILES):
        file = f"model-{number:05d}.safetensors"
        names = [f"layers.{block}.mlp.{number}.weight" for block in range(BLOCKS)]
        head, entries = build_header([(name, torch.bfloat16, (1024, 1024)) for name in names])
        with (folder / file).open("wb") as opened:
            opened.write(head)
            opened.truncate(entries[-1].start + entries[-1].num_bytes)
        weight_map |= dict.fromkeys(names, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text("{}")


@pytest.mark.slow
def test_a_hundred_thousand_tensors(tmp_path: Path) -> None:
    for name in NAMES:
        write(tmp_path / name)
    asked = recipe(*(tmp_path / name for name in NAMES), method="task_arithmetic")
    done = python(PLANNED, json.dumps(asked))
    assert done.returncode == 0, done.stderr
    num_tensors, read, written, peak = json.loads(done.stdout)
    assert num_tensors * len(NAMES) > 100_000
    assert written == num_tensors * 2 * 2**20 and read == len(NAMES) * written
    assert peak < 1_000_000_000


def test_the_peak_of_a_process_is_its_own() -> None:
    """And not that of a larger one that has started it."""
    large = b"x" * 800_000_000
    done = python("from raymerge.plan.execute import peak_bytes; print(peak_bytes())")
    assert 0 < int(done.stdout) < len(large), done.stderr
