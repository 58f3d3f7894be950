"""The files of a finished search: what was found, in `raymerge/search.json`."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from raymerge.checkpoint.place import OutputPath
from raymerge.checkpoint.writer import write_text
from raymerge.plan.schema import Plan
from raymerge.recipe.schema import Recipe, Search

FACTS = "raymerge/search.json"


def search_digest(plans: Sequence[Plan], recipe: Recipe, hashes: Sequence[str]) -> str:
    """Identifies a search: its `plans`, one for each method, its space, and its tasks with the `hashes` of their files.

    How many trials run at once is no part of it: a search may go on with another number.
    """
    assert recipe.search is not None
    asked = recipe.search.model_dump(mode="json", exclude={"concurrent", "cpus_per_trial"})
    tests = [task.model_dump(mode="json") for task in recipe.evaluate]
    return hashlib.sha256(
        json.dumps([[plan.digest for plan in plans], asked, tests, list(hashes)]).encode()
    ).hexdigest()


def write_search(
    folder: Path,
    *,
    asked: Search,
    best: Any,
    trials: Sequence[Any],
    elapsed_seconds: float,
    test: Mapping[str, Any] | None,
) -> None:
    """Write what a search has found below its folder."""
    facts = {
        "searcher": asked.searcher,
        "num_trials": len(trials),
        "num_failed": sum(trial.error is not None for trial in trials),
        "best": {"trial": best.number, "values": dict(best.values), "scores": dict(best.scores)},
        "objectives": {name: best.scores[name] for name in asked.objective},
        "elapsed_seconds": elapsed_seconds,
        "test": test,
    }
    write_text(folder / FACTS, json.dumps(facts, indent=2) + "\n")


def read_search(folder: OutputPath) -> dict[str, Any]:
    """What a search has found."""
    found: dict[str, Any] = json.loads((folder / FACTS).read_text(encoding="utf-8"))
    return found
