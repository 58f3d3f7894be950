"""Distil a Llama shape of 1.1 B parameters with three experts: the peak memory, and what was predicted.

    python jobs/bench/large.py FOLDER

FOLDER keeps 8.8 GB of checkpoints between runs. Few samples and epochs: memory does not depend on them.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
from datetime import date
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from checkpoints import SHAPES, make_checkpoints
from processes import run_measured

EXPERTS = ("first", "second", "third")
RAYMERGE = [sys.executable, "-m", "raymerge"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where checkpoints are kept and the output is written")
    parser.add_argument("--size", choices=SHAPES, default="1b")
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=2)
    arguments = parser.parse_args()
    folder = arguments.folder.absolute() / arguments.size
    places = make_checkpoints(folder, SHAPES[arguments.size], EXPERTS)
    generator = torch.Generator().manual_seed(0)
    shape = (arguments.samples, arguments.tokens)
    ids = torch.randint(SHAPES[arguments.size].vocabulary, shape, generator=generator)
    pq.write_table(pa.table({"input_ids": ids.tolist()}), folder / "samples.parquet")
    content = {
        "base": str(places["base"]),
        "experts": {n: {"path": str(places[n]), "calibration": str(folder / "samples.parquet")} for n in EXPERTS},
        "method": "prodistill",
        "settings": {
            "epochs": arguments.epochs,
            "samples": arguments.samples,
            "max_length": arguments.tokens,
            "batch_size": 2,
            "coefficient": 0.5,
        },
    }
    recipe = folder / "recipe.json"
    recipe.write_text(json.dumps(content))
    out = folder / "out"
    shutil.rmtree(out, ignore_errors=True)
    printed = subprocess.run([*RAYMERGE, "plan", str(recipe), "--json"], capture_output=True, text=True, check=True)
    predicted = json.loads(printed.stdout)["peak_bytes_per_worker"]
    found = run_measured([*RAYMERGE, "merge", str(recipe), str(out), "--local", "--quiet"])
    units = json.loads((out / "raymerge" / "run.json").read_text())["units"]
    shutil.rmtree(out)
    print(f"{platform.machine()}, {os.cpu_count()} cores, {date.today().isoformat()}, shape {arguments.size}")
    print(f"{len(units)} blocks in {found.elapsed_seconds:.0f} s; every loss fell: {all_fell(units)}")
    print(
        f"peak {found.peak_bytes / 1e9:.2f} GB, predicted {predicted / 1e9:.2f} GB, {predicted / found.peak_bytes:.2f}"
    )


def all_fell(units: list[dict[str, list[float]]]) -> bool:
    return all(unit["losses"][-1] < unit["losses"][0] for unit in units)


if __name__ == "__main__":
    main()
