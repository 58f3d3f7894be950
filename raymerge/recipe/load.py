"""Read a recipe: YAML text, a file, or a dict; our own format or mergekit's. Typos are refused here."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from raymerge import methods
from raymerge.errors import RecipeError
from raymerge.recipe import mergekit
from raymerge.recipe.schema import Recipe
from raymerge.recipe.settings import check_settings, nearest

RESERVED = ("base", "union", "auto")


def load_recipe(source: str | Path | Mapping[str, Any] | Recipe) -> Recipe:
    """A checked recipe from a file's path, a dict, or a recipe.

    Raises RecipeError: a file that cannot be read, YAML that is none, unknown keys, wrong types,
    settings the method does not have. Relative paths in a recipe start at the working directory.
    """
    if isinstance(source, Recipe):
        return source
    where = "recipe" if isinstance(source, Mapping) else str(source)
    content = dict(source) if isinstance(source, Mapping) else _read(Path(source))
    recipe = mergekit.read(content, where) if "merge_method" in content else validate(content, where)
    _check(recipe, where)
    return recipe


def validate(content: Mapping[str, Any], where: str) -> Recipe:
    """A recipe from a dict in our own format. Raises RecipeError for unknown keys and wrong types."""
    try:
        return Recipe.model_validate(content)
    except ValidationError as problem:
        raise RecipeError("\n".join(f"{where}: {_explain(error, Recipe)}" for error in problem.errors())) from None


def _read(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as problem:
        raise RecipeError(f"{path}: cannot be read: {problem.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as problem:
        raise RecipeError(f"{path}: not YAML: {problem}") from None
    if not isinstance(content, dict):
        raise RecipeError(
            f"{path}: found {type(content).__name__}; a mapping with base, experts and method is expected"
        )
    return content


def _explain(error: Any, root: type[BaseModel]) -> str:
    # pydantic names the branch of a union or validator in the location too; users have not written those.
    place = [part for part in error["loc"] if not (isinstance(part, str) and ("[" in part or "-" in part))]
    text = ".".join(map(str, place))
    if error["type"] == "extra_forbidden":
        return f"{text}: unknown key; {nearest(str(place[-1]), _keys_at(root, place[:-1]))}"
    said = error["msg"]
    return f"{text}: {said[0].lower()}{said[1:]}, found {error['input']!r}"


def _keys_at(model: type[BaseModel], place: list[Any]) -> list[str]:
    """The keys allowed at a place in a recipe."""
    for part in place:
        field = model.model_fields.get(part) if isinstance(part, str) else None
        inner = _model_in(field.annotation) if field else None
        model = inner or model
    return list(model.model_fields)


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    found = (_model_in(inner) for inner in getattr(annotation, "__args__", ()))
    return next((model for model in found if model), None)


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
