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


def write_recipe(folder: Path, method: str) -> Path:
    """Write the recipe of a method below `folder`, ready for every verb; returns its path."""
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
    path = folder / "recipes" / f"{method}.yml"
    write_text(path, yaml.safe_dump(recipe, sort_keys=False))
    return path
