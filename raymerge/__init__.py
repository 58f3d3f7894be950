"""RayMerge: one checkpoint out of many fine-tuned ones, on a laptop or a Ray cluster.

The verbs are functions: `raymerge.merge(recipe, out)`, `raymerge.plan(recipe)`, `raymerge.search(recipe, out)`,
`raymerge.evaluate(model, recipe)`, `raymerge.report(out)`. Importing this package is cheap; a verb loads what it needs.
"""

import importlib
from typing import TYPE_CHECKING, Any

from raymerge.errors import RayMergeError, UserError

if TYPE_CHECKING:
    from raymerge.api import MergeResult as MergeResult
    from raymerge.api import evaluate as evaluate
    from raymerge.api import forecast as forecast
    from raymerge.api import merge as merge
    from raymerge.api import plan as plan
    from raymerge.api import report as report
    from raymerge.api import search as search
    from raymerge.models.heads import load_task_model as load_task_model

__version__ = "0.1.0"
__all__ = [
    "MergeResult",
    "RayMergeError",
    "UserError",
    "evaluate",
    "forecast",
    "load_task_model",
    "merge",
    "plan",
    "report",
    "search",
]

_HOMES = {
    "MergeResult": "raymerge.api",
    "evaluate": "raymerge.api",
    "forecast": "raymerge.api",
    "load_task_model": "raymerge.models.heads",
    "merge": "raymerge.api",
    "plan": "raymerge.api",
    "report": "raymerge.api",
    "search": "raymerge.api",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'raymerge' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
