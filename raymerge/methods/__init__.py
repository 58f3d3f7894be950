"""The catalogue: every method by its recipe name. Read `base.py` first, then any method.

A method is one file (or one family in a file) and one line here. A private method needs no line:
`method: my_package.my_module:MyMethod` in a recipe finds it.
"""

import ast
import difflib
import importlib
import inspect
import sys
import textwrap
from dataclasses import MISSING
from itertools import pairwise
from pathlib import Path

from raymerge.errors import RecipeError
from raymerge.methods.base import TensorMethod, default_of, is_per_expert, setting_fields

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
    "prodistill": "prodistill:Prodistill",
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


def describe(method: type[TensorMethod]) -> list[tuple[str, str, str]]:
    """Name, default and meaning of each setting of a method, from the dataclass and its docstrings."""
    texts: dict[str, str] = {}
    for cls in reversed(method.__mro__[:-1]):
        if cls.__module__ != "abc":
            texts.update(_field_texts(cls))
    found = []
    for name, setting in setting_fields(method).items():
        default = default_of(setting)
        shown = "required" if default is MISSING else str(default)
        found.append((name, shown + (" per expert" if is_per_expert(setting) else ""), texts.get(name, "")))
    return found


def _field_texts(cls: type) -> dict[str, str]:
    """The string under each annotated field of a class."""
    body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
    assert isinstance(body, ast.ClassDef)
    return {
        field.target.id: " ".join(text.value.value.split())
        for field, text in pairwise(body.body)
        if isinstance(field, ast.AnnAssign)
        and isinstance(field.target, ast.Name)
        and isinstance(text, ast.Expr)
        and isinstance(text.value, ast.Constant)
        and isinstance(text.value.value, str)
    }


def _private(name: str) -> type[TensorMethod]:
    module, _, cls = name.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)
    try:
        found = getattr(importlib.import_module(module), cls)
    except (ImportError, AttributeError, ValueError) as problem:
        raise RecipeError(f"method: {name!r} could not be imported ({problem}); give package.module:Class") from None
    if not (isinstance(found, type) and issubclass(found, TensorMethod)):
        raise RecipeError(
            f"method: {name!r} is {found!r}; a subclass of raymerge.methods.base.TensorMethod is expected"
        )
    return found
