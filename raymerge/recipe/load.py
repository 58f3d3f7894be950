"""Read a recipe: YAML text, a file, or a dict; our own format or mergekit's. Typos are refused here."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from raymerge import methods
from raymerge.errors import RecipeError, nearest
from raymerge.recipe import mergekit
from raymerge.recipe.schema import Recipe
from raymerge.recipe.settings import check_settings
from raymerge.recipe.validation import validate

RESERVED = ("base", "union", "auto")


class _Loader(yaml.SafeLoader):
    """YAML 1.1, but `1e-3` is a number, as in YAML 1.2 and as everyone means it, and no key may stand twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        found = super().construct_mapping(node, deep)
        if len(found) < len(node.value):
            raise yaml.constructor.ConstructorError(None, None, "a key stands twice", node.start_mark)
        return found


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(?:\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def load_recipe(source: str | Path | Mapping[str, Any] | Recipe) -> Recipe:
    """A checked recipe from a file's path, a dict, or a recipe.

    Raises RecipeError: a file that cannot be read, YAML that is none, unknown keys, wrong types,
    settings the method does not have. Relative paths in a recipe start at the working directory.
    """
    if isinstance(source, Recipe):
        return source
    where = "recipe" if isinstance(source, Mapping) else str(source)
    content = dict(source) if isinstance(source, Mapping) else _read(Path(source))
    recipe = mergekit.read(content, where) if "merge_method" in content else validate(Recipe, content, where)
    _check(recipe, where)
    return recipe


def _read(path: Path) -> dict[str, Any]:
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except OSError as problem:
        raise RecipeError(f"{path}: cannot be read: {problem.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as problem:
        raise RecipeError(f"{path}: not YAML: {problem}") from None
    if not isinstance(content, dict):
        raise RecipeError(
            f"{path}: found {type(content).__name__}; a mapping with base, experts and method is expected"
        )
    return content


def _check(recipe: Recipe, where: str) -> None:
    method = methods.find(recipe.method)
    check_settings(recipe.method, method, recipe.settings, f"{where}: settings", narrow=False)
    for name, expert in recipe.experts.items():
        if name in RESERVED or not name or "/" in name or name.startswith("."):
            raise RecipeError(f"{where}: experts.{name}: this name is reserved or no folder name; give another")
        check_settings(recipe.method, method, expert.settings, f"{where}: experts.{name}.settings", narrow=True)
    if method.needs_base and recipe.base is None:
        raise RecipeError(f"{where}: base: missing; {recipe.method} merges task vectors, which need one")
    known = {*recipe.experts, "base"}
    for i, part in enumerate(recipe.slices or []):
        check_settings(recipe.method, method, part.settings, f"{where}: slices.{i}.settings", narrow=False)
        for name, source in part.sources.items():
            here = f"{where}: slices.{i}.sources.{name}"
            if name not in known:
                raise RecipeError(f"{here}: no such model; {nearest(name, sorted(known))}")
            check_settings(recipe.method, method, source.settings, f"{here}.settings", narrow=True)
    for i, task in enumerate(recipe.evaluate):
        if task.expert is not None and task.expert not in recipe.experts:
            raise RecipeError(
                f"{where}: evaluate.{i}.expert: no expert {task.expert!r}; {nearest(task.expert, recipe.experts)}"
            )
    tokenizer = recipe.output.tokenizer
    if tokenizer not in (None, "base", "union", *recipe.experts):
        raise RecipeError(
            f"{where}: output.tokenizer: found {tokenizer!r}; base, union or an expert's name is expected"
        )
