"""Merging against mergekit, whole command against whole command, in alternation, with the floor of plain copies.

    python3 -m venv /tmp/mergekit && /tmp/mergekit/bin/pip install torch==2.13.0 mergekit==0.1.5
    python jobs/bench/merge.py FOLDER --mergekit /tmp/mergekit/bin/mergekit-yaml

FOLDER keeps 3.3 GB of checkpoints between runs. Every command reads the same mergekit YAML.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

import yaml
from checkpoints import SHAPES, make_checkpoints
from processes import Measured, run_measured
from rich.console import Console
from rich.table import Table

EXPERTS = ("first", "second", "third")
METHODS = ("linear", "task_arithmetic", "ties", "dare_ties")
# The environment's own raymerge, where this script runs.
RAYMERGE = [sys.executable, "-m", "raymerge"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where checkpoints are kept and outputs are written")
    parser.add_argument("--mergekit", type=Path, help="the mergekit-yaml command of mergekit's own environment")
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--rounds", type=int, default=3, help="counted rounds, after one that is not")
    parser.add_argument("--size", choices=SHAPES, default="430m")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    arguments = parser.parse_args()
    folder = arguments.folder.absolute() / arguments.size
    places = make_checkpoints(folder, SHAPES[arguments.size], EXPERTS)
    rows = [measure(method, folder, places, arguments.mergekit, arguments.rounds) for method in arguments.methods]
    facts = {
        "machine": f"{cpu_name()}, {os.cpu_count()} cores, {date.today().isoformat()}",
        "shape": arguments.size,
        "rounds": arguments.rounds,
        "floor_seconds": floor_seconds(folder, places),
    }
    print(json.dumps({**facts, "methods": rows}, indent=2)) if arguments.json else show(facts, rows)


def measure(
    method: str, folder: Path, places: dict[str, Path], mergekit: Path | None, rounds: int
) -> dict[str, object]:
    """Medians of each command on one method, commands taking turns; the first turn only warms caches."""
    recipe = write_recipe(method, folder, places)
    out = folder / "out"
    commands = {
        "ray": [*RAYMERGE, "merge", str(recipe), str(out), "--quiet"],
        "local": [*RAYMERGE, "merge", str(recipe), str(out), "--quiet", "--local"],
    }
    if mergekit is not None:
        commands["mergekit"] = [str(mergekit), str(recipe), str(out), "--quiet"]
    taken: dict[str, list[Measured]] = {name: [] for name in commands}
    for turn in range(rounds + 1):
        for name, command in commands.items():
            shutil.rmtree(out, ignore_errors=True)
            found = run_measured(command)
            if turn:
                taken[name].append(found)
    shutil.rmtree(out, ignore_errors=True)
    row: dict[str, object] = {"method": method, "predicted_peak_gb": predicted_peak(recipe) / 1e9}
    for name, runs in taken.items():
        row[f"{name}_seconds"] = statistics.median(run.elapsed_seconds for run in runs)
        row[f"{name}_peak_gb"] = max(run.peak_bytes for run in runs) / 1e9
    if mergekit is not None:
        for name in ("ray", "local"):
            pairs = zip(taken["mergekit"], taken[name], strict=True)
            ratios = [theirs.elapsed_seconds / ours.elapsed_seconds for theirs, ours in pairs]
            row[f"{name}_times_faster"] = statistics.median(ratios)
    return row


def write_recipe(method: str, folder: Path, places: dict[str, Path]) -> Path:
    parameters = {"weight": 0.4} | ({"density": 0.3} if method in ("ties", "dare_ties") else {})
    content: dict[str, object] = {
        "merge_method": method,
        "models": [{"model": str(places[name]), "parameters": parameters} for name in EXPERTS],
        "dtype": "bfloat16",
    }
    if method != "linear":
        content["base_model"] = str(places["base"])
    recipe = folder / f"{method}.yml"
    recipe.write_text(yaml.safe_dump(content, sort_keys=False))
    return recipe


def predicted_peak(recipe: Path) -> int:
    printed = subprocess.run([*RAYMERGE, "plan", str(recipe), "--json"], capture_output=True, text=True, check=True)
    return int(json.loads(printed.stdout)["peak_bytes_per_worker"])


def floor_seconds(folder: Path, places: dict[str, Path]) -> float:
    """Reading all inputs and writing one output with plain file copies: what no merge can beat by much."""
    begun = time.perf_counter()
    buffer = bytearray(2**24)
    for place in places.values():
        for file in sorted(place.glob("*.safetensors")):
            with file.open("rb", buffering=0) as opened:
                while opened.readinto(buffer):
                    pass
    target = folder / "copied"
    shutil.copytree(places["base"], target, dirs_exist_ok=True)
    for file in target.iterdir():
        handle = os.open(file, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)
    elapsed = time.perf_counter() - begun
    shutil.rmtree(target)
    return elapsed


def cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


def show(facts: dict[str, object], rows: list[dict[str, object]]) -> None:
    table = Table(title=f"{facts['machine']}; plain copies take {facts['floor_seconds']:.1f} s")
    columns = list(rows[0])
    for column in columns:
        table.add_column(column.replace("_", " "), justify="left" if column == "method" else "right")
    for row in rows:
        table.add_row(*(f"{row[c]:.2f}" if isinstance(row[c], float) else str(row[c]) for c in columns))
    Console(width=160).print(table)


if __name__ == "__main__":
    main()
