"""The space of a search: which numbers a trial draws, and the recipe that they make.

A range in the recipe may stand for several numbers: one for each expert, for each of some knots along the depth, for
the tensors of each filter. Each of them is an axis.
"""

from collections.abc import Mapping
from dataclasses import MISSING, dataclass
from typing import Any, get_type_hints

from raymerge import methods
from raymerge.errors import RecipeError, nearest
from raymerge.methods.base import LearnedMethod, TensorMethod, default_of, is_per_expert, setting_fields
from raymerge.recipe.layers import hops, slices_of, slots
from raymerge.recipe.load import load_recipe
from raymerge.recipe.schema import Range, Recipe, Scalar, Search

# Where settings of these names make sense, in every method that has them.
USUAL: Mapping[str, tuple[float, float]] = {
    "coefficient": (0.0, 1.0),
    "weight": (0.0, 1.0),
    "scale": (0.2, 2.0),
    "density": (0.05, 1.0),
    "t": (0.0, 1.0),
    "q": (0.1, 1.0),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Axis:
    """One number, or one choice, of a trial. `method`: only trials of this method have it."""

    name: str
    setting: str
    range: Range
    whole: bool
    method: str | None = None
    expert: str | None = None
    knot: int = 0
    filter: str | None = None


def axes(recipe: Recipe) -> tuple[Axis, ...]:
    """All axes of a recipe's space, the method's own first. Raises RecipeError for what no trial could have."""
    search = _search(recipe)
    if search.layers is not None:
        return _layer_axes(recipe, search)
    space = search.space or _usual_space(methods.find(recipe.method))
    found: list[Axis] = []
    if "method" in space:
        named = space["method"]
        if not named.choices:
            raise RecipeError("search.space.method: choices are expected, names of methods")
        for name in named.choices:
            methods.find(str(name))
        found.append(Axis(name="method", setting="method", range=named, whole=False))
    for place, given in space.items():
        if place != "method":
            found += _axes_at(place, given, recipe)
    if not found:
        raise RecipeError(
            f"search.space: {recipe.method} has no settings with a usual range; say what is to be searched"
        )
    return tuple(found)


def candidates(recipe: Recipe) -> tuple[str, ...]:
    """The methods that trials may have."""
    space = _search(recipe).space
    return tuple(map(str, space["method"].choices or ())) if "method" in space else (recipe.method,)


def first_recipes(recipe: Recipe, found: tuple[Axis, ...]) -> list[Recipe]:
    """A recipe of each method that trials may have, for a look at what does not fit before any trial."""
    values: dict[str, Scalar] = {}
    for axis in found:
        given = axis.range
        # A block is kept above 0; elsewhere the low end is as good as any.
        number = given.high if axis.setting == "layers" else given.low
        assert given.choices or number is not None
        values[axis.name] = given.choices[0] if given.choices else int(number or 0) if axis.whole else number or 0.0
    return [trial_recipe(recipe, found, {**values, "method": method}) for method in candidates(recipe)]


def trial_recipe(recipe: Recipe, found: tuple[Axis, ...], values: Mapping[str, Scalar]) -> Recipe:
    """The recipe of one trial, without its search; `values` go by the axes' names. Raises RecipeError."""
    content = recipe.as_written()
    content.pop("search", None)
    content["method"] = str(values.get("method", recipe.method))
    layers = _search(recipe).layers
    if layers is not None:
        content["slices"] = slices_of(recipe, layers, values)
        return load_recipe(content)
    method = methods.find(content["method"])
    known = setting_fields(method)
    for part in (content, *content["experts"].values()):
        part["settings"] = {name: value for name, value in part.get("settings", {}).items() if name in known}
    groups: dict[tuple[str | None, str], list[Axis]] = {}
    for axis in found:
        if axis.setting in known and axis.name in values and axis.method in (None, content["method"]):
            groups.setdefault((axis.expert, axis.setting), []).append(axis)
    for (expert, setting), members in groups.items():
        value = _assembled(members, values)
        if expert is None:
            content["settings"][setting] = value
        else:
            content["experts"][expert]["settings"][setting] = value
    return load_recipe(content)


def _search(recipe: Recipe) -> Search:
    return recipe.search or Search()


def _layer_axes(recipe: Recipe, search: Search) -> tuple[Axis, ...]:
    assert search.layers is not None
    if recipe.method != "passthrough" or recipe.slices is not None or search.space:
        raise RecipeError("search.layers: method: passthrough is expected, without slices and without search.space")
    # Kept above 0: numbers, not choices, so that every searcher can move along them.
    kept = Range(low=-1.0, high=1.0)
    found = [Axis(name=slot.name, setting="layers", range=kept, whole=False) for slot in slots(recipe, search.layers)]
    if search.layers.scale is not None:
        _check_range(search.layers.scale, "search.layers.scale")
        found += [
            Axis(name=name, setting="layers", range=search.layers.scale, whole=False) for name in hops(recipe).values()
        ]
    return tuple(found)


def _axes_at(place: str, given: Range, recipe: Recipe) -> list[Axis]:
    where = f"search.space.{place}"
    only, _, setting = place.rpartition("settings.")
    only = only.removesuffix(".")
    possible = [only] if only else list(candidates(recipe))
    if "settings." not in place or (only and only not in candidates(recipe)):
        raise RecipeError(f"{where}: settings.NAME, METHOD.settings.NAME or method is expected")
    twin = f"settings.{setting}" if only else None
    if twin in _search(recipe).space:
        raise RecipeError(f"{where}: {twin} is there too; one of them is expected")
    owners = [name for name in possible if setting in setting_fields(methods.find(name))]
    if not owners:
        known = [known for name in possible for known in setting_fields(methods.find(name))]
        raise RecipeError(f"{where}: {', '.join(possible)} has no such setting; {nearest(setting, known)}")
    _check_range(given, where)
    masked = next((name for name, expert in recipe.experts.items() if setting in expert.settings), None)
    if masked is not None:
        raise RecipeError(f"{where}: experts.{masked}.settings.{setting} stands above it; leave one of them out")
    for owner in owners:
        if given.per == "expert" and not is_per_expert(setting_fields(methods.find(owner))[setting]):
            raise RecipeError(f"{where}.per: {setting} of {owner} is one for all experts; leave per out")
    whole = {_is_whole(methods.find(owner), setting) for owner in owners}
    if len(whole) > 1:
        raise RecipeError(f"{where}: {setting} is a whole number for some of {', '.join(owners)}; name one method")
    found = []
    for expert in recipe.experts if given.per == "expert" else (None,):
        for part in (*given.filters, "*") if given.filters else (None,):
            for knot in range(given.knots):
                name = place + (f"[{expert}]" if expert else "") + (f"{{{part}}}" if part else "")
                found.append(
                    Axis(
                        name=f"{name}@{knot}" if given.knots > 1 else name,
                        setting=setting,
                        range=given,
                        whole=whole == {True},
                        method=only or None,
                        expert=expert,
                        knot=knot,
                        filter=part,
                    )
                )
    return found


def _check_range(given: Range, where: str) -> None:
    if (given.choices is None) == (given.low is None) or (given.low is None) != (given.high is None):
        raise RecipeError(f"{where}: low and high, or choices, are expected")
    if given.low is not None and given.high is not None:
        if given.low >= given.high:
            raise RecipeError(f"{where}: low is {given.low:g} and high {given.high:g}; low below high is expected")
        if given.log and (given.low <= 0 or given.step):
            raise RecipeError(f"{where}.log: needs a low above 0, and no step")
    elif given.knots > 1 and any(isinstance(choice, str | bool) for choice in given.choices or ()):
        raise RecipeError(f"{where}.knots: a gradient is of numbers")


def _usual_space(method: type[TensorMethod]) -> dict[str, Range]:
    """Every setting with a usual range; for learned methods the start's coefficient alone."""
    names = ("coefficient",) if issubclass(method, LearnedMethod) else tuple(USUAL)
    own = setting_fields(method)
    return {
        f"settings.{name}": Range(low=USUAL[name][0], high=USUAL[name][1])
        for name in names
        if name in own and (is_per_expert(own[name]) or _is_number(default_of(own[name])))
    }


def _is_whole(method: type[TensorMethod], setting: str) -> bool:
    return not is_per_expert(setting_fields(method)[setting]) and get_type_hints(method)[setting] is int


def _is_number(default: Any) -> bool:
    return default is MISSING or (isinstance(default, int | float) and not isinstance(default, bool))


def _assembled(members: list[Axis], values: Mapping[str, Scalar]) -> Any:
    """A number, a gradient, or filtered ones, as a recipe writes them."""
    by_filter: dict[str | None, list[Scalar]] = {}
    for axis in members:
        by_filter.setdefault(axis.filter, []).append(values[axis.name])
    shown = {part: found[0] if len(found) == 1 else found for part, found in by_filter.items()}
    if None in shown:
        return shown[None]
    return [{"filter": part, "value": value} for part, value in shown.items()]
