"""Both schedules of ProDistill on one recipe: scores, time, and the time that several nodes would take.

    python jobs/bench/schedules.py RECIPE FOLDER

RECIPE has an `evaluate` section. Times on several nodes are simulated from the seconds of every fit here: each stage
on a machine like this one, handing on the samples in no time. The corrected schedule splits the epochs 3 to 1.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from table import show

from raymerge import api
from raymerge.distill.schedule import DRAFT, TAIL
from raymerge.recipe.load import load_recipe


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("folder", type=Path, help="where merges are written")
    parser.add_argument("--stages", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    arguments = parser.parse_args()
    recipe = load_recipe(arguments.recipe).as_written()
    epochs = recipe["settings"].get("epochs", 50)
    short = epochs // 4
    rows = [
        measure("progressive", recipe, {}, arguments),
        measure("parallel", recipe, {"schedule": "parallel", "epochs": epochs}, arguments),
        measure(
            "parallel, corrected",
            recipe,
            {"schedule": "parallel", "epochs": epochs - short, "correction_epochs": short},
            arguments,
        ),
    ]
    show(rows, arguments.json, digits=3)


def measure(
    name: str, recipe: Mapping[str, Any], settings: Mapping[str, Any], arguments: argparse.Namespace
) -> dict[str, Any]:
    asked = {**recipe, "settings": {**recipe["settings"], **settings}}
    out = arguments.folder / name.replace(", ", "-")
    api.merge(asked, out, local=True, overwrite=True)
    units = json.loads((out / "raymerge" / "run.json").read_text())["units"]
    first = [unit["elapsed_seconds"] for unit in units if is_free(unit["unit"], settings)]
    others = [unit["elapsed_seconds"] for unit in units if not is_free(unit["unit"], settings)]
    return {
        "schedule": name,
        "epochs": " + ".join(str(n) for n in (asked["settings"]["epochs"], settings.get("correction_epochs")) if n),
        "mean": api.evaluate(out, asked).mean,
        "seconds": sum(first) + sum(others),
        **{f"simulated, {n} stages": simulated_seconds(first, others, n) for n in arguments.stages},
    }


def is_free(unit: str, settings: Mapping[str, Any]) -> bool:
    """The fit of this unit waits for no other."""
    if settings.get("correction_epochs"):
        return unit.endswith(DRAFT)
    return settings.get("schedule") == "parallel" and unit != TAIL


def simulated_seconds(free: Sequence[float], others: Sequence[float], stages: int) -> float:
    """The slowest stage's free fits, and all others one after the other."""
    count = len(free)
    shares = [sum(free[count * n // stages : count * (n + 1) // stages]) for n in range(stages)]
    return max(shares) + sum(others)


if __name__ == "__main__":
    main()
