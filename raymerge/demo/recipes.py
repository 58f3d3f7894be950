"""The recipes of the demo: one per method, on the same base, experts and test rows."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from raymerge.checkpoint.writer import write_text
from raymerge.demo.domains import DOMAINS, EXPERTS
from raymerge.recipe.schema import Task

# Methods with the settings that suit small models trained for seconds; what is not said is the default.
METHODS: Mapping[str, Mapping[str, Any]] = {
    "linear": {},
    "task_arithmetic": {"coefficient": 0.4},
    "ties": {"scale": 0.8, "density": 0.5},
    "dare_ties": {"scale": 0.8, "density": 0.5},
    "breadcrumbs": {"coefficient": 0.4, "density": 0.85},
    "model_stock": {},
    "multislerp": {},
    "sce": {},
    "iso_c": {"scale": 4.0},
    "tsv": {"scale": 1.4},
    "prodistill": {"coefficient": 0.5, "epochs": 100, "lr": 0.06, "fit_tail": True},
}


# Of the search that is the demo's last act.
SEARCH_TRIALS = 24


def tasks(folder: Path) -> list[Task]:
    """One task per domain, on the test rows below `folder`; each expert is the reference for its own."""
    return [
        Task(
            task=domain,
            kind="classification",
            data=str(data_path(folder, domain)),
            expert=domain if domain in EXPERTS else None,
            batch_size=128,
        )
        for domain in DOMAINS
    ]


def data_path(folder: Path, domain: str) -> Path:
    return folder / "data" / f"{domain}.parquet"


def calibration_path(folder: Path, domain: str) -> Path:
    return folder / "calibration" / f"{domain}.parquet"


def model_path(folder: Path, name: str) -> Path:
    return folder / "models" / name


def write_search(folder: Path) -> Path:
    """Write the recipe of a short search: a coefficient for each expert, on the labelled calibration images."""
    recipe = _recipe(folder, "task_arithmetic")
    del recipe["settings"]
    valid = [{**task, "data": str(calibration_path(folder, task["task"]))} for task in recipe["evaluate"]]
    recipe["search"] = {
        "trials": SEARCH_TRIALS,
        # One at a time: the same trials again.
        "concurrent": 1,
        "space": {"settings.coefficient": {"low": 0.0, "high": 1.0, "per": "expert"}},
        "evaluate": [task for task in valid if task["task"] in EXPERTS],
    }
    return _write(folder, "search", recipe)


def write_recipe(folder: Path, method: str) -> Path:
    """Write the recipe of a method below `folder`, ready for every verb; returns its path."""
    return _write(folder, method, _recipe(folder, method))


def _recipe(folder: Path, method: str) -> dict[str, Any]:
    recipe: dict[str, Any] = {
        "base": str(model_path(folder, "base")),
        "experts": {
            name: {"path": str(model_path(folder, name)), "calibration": str(calibration_path(folder, name))}
            for name in EXPERTS
        },
        "method": method,
        # Each expert keeps its own head, which its domain is measured with.
        "output": {"heads": ["classifier"]},
    }
    if METHODS[method]:
        recipe["settings"] = dict(METHODS[method])
    recipe["evaluate"] = [task.model_dump(exclude_defaults=True) for task in tasks(folder)]
    return recipe


def _write(folder: Path, name: str, recipe: Mapping[str, Any]) -> Path:
    path = folder / "recipes" / f"{name}.yml"
    write_text(path, yaml.safe_dump(dict(recipe), sort_keys=False))
    return path
