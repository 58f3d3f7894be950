"""The catalogue: every method by its recipe name. Read `base.py` first, then any method.

A method is one file (or one family in a file) and one line here. A private method needs no line:
`method: my_package.my_module:MyMethod` in a recipe finds it.
"""

import difflib
import importlib
import sys
from pathlib import Path

from raymerge.errors import RecipeError
from raymerge.methods.base import TensorMethod

CATALOGUE = {
    "linear": "linear:Linear",
    "task_arithmetic": "task_arithmetic:TaskArithmetic",
    "ties": "ties:Ties",
    "dare_linear": "dare:DareLinear",
    "dare_ties": "dare:DareTies",
    "darex_q": "dare:DarexQ",
    "breadcrumbs": "breadcrumbs:Breadcrumbs",
    "breadcrumbs_ties": "breadcrumbs:BreadcrumbsTies",
    "della": "della:Della",
    "della_linear": "della:DellaLinear",
    "pcb": "pcb:Pcb",
    "model_stock": "model_stock:ModelStock",
    "slerp": "slerp:Slerp",
    "nuslerp": "nuslerp:Nuslerp",
    "multislerp": "multislerp:Multislerp",
    "karcher": "karcher:Karcher",
    "sce": "sce:Sce",
    "iso_c": "iso:IsoC",
    "iso_cts": "iso:IsoCts",
    "tsv": "tsv:Tsv",
    "passthrough": "passthrough:Passthrough",
    "bcwi": "bcwi:Bcwi",
}


def find(name: str) -> type[TensorMethod]:
    """The class of a method: a catalogue name, or `package.module:Class` for a private one.

    Raises RecipeError if there is none, with the nearest name.
    """
    if ":" in name:
        return _private(name)
    if name not in CATALOGUE:
        near = difflib.get_close_matches(name, CATALOGUE, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(CATALOGUE)}"
        raise RecipeError(f"method: found {name!r}, which is no method; {hint}")
    module, _, cls = CATALOGUE[name].partition(":")
    found: type[TensorMethod] = getattr(importlib.import_module(f"raymerge.methods.{module}"), cls)
    return found


def _private(name: str) -> type[TensorMethod]:
    module, _, cls = name.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)
    try:
        found = getattr(importlib.import_module(module), cls)
    except (ImportError, AttributeError) as problem:
        raise RecipeError(
            f"method: {name!r} could not be imported ({problem}); give package.module:Class"
        ) from None
    if not (isinstance(found, type) and issubclass(found, TensorMethod)):
        raise RecipeError(
            f"method: {name!r} is {found!r}; a subclass of raymerge.methods.base.TensorMethod is expected"
        )
    return found
