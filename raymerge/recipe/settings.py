"""What a setting is for one tensor: numbers, gradients over depth, filters (as in mergekit).

A gradient is linear between its entries over a slice's blocks; tensors outside the blocks stand at
depth 0. A filter is a part of the tensor's name; the first that matches counts, and if none does the
next wider scope is asked: source, then slice, then recipe, then the method's default.
"""

from collections.abc import Iterable, Sequence
from dataclasses import MISSING, Field
from typing import Any, get_type_hints

from pydantic import TypeAdapter, ValidationError

from raymerge.errors import RecipeError, nearest
from raymerge.methods.base import TensorMethod, default_of, is_per_expert, setting_fields
from raymerge.recipe.schema import Filtered, Scalar, Setting, Settings

Depth = float


def evaluate_setting(setting: Setting, name: str, depth: Depth) -> Scalar | None:
    """The value of a setting for the tensor `name` at `depth` in [0, 1]; None if no filter matches."""
    if not isinstance(setting, list):
        return setting
    if not setting:
        return None
    if isinstance(setting[0], Filtered):
        for choice in setting:
            assert isinstance(choice, Filtered)
            if choice.filter in (None, "*") or (choice.filter and choice.filter in name):
                return evaluate_setting(choice.value, name, depth)
        return None
    knots: Sequence[Any] = setting
    position = depth * (len(knots) - 1)
    left = int(position)
    if any(isinstance(knot, str | bool) for knot in knots):
        found: Scalar = knots[left]
        return found
    right = min(left + 1, len(knots) - 1)
    between = position - left
    return float((1 - between) * knots[left] + between * knots[right])


def lookup(scopes: Iterable[Settings], key: str, name: str, depth: Depth) -> Scalar | None:
    """The value of `key` in the narrowest scope that has one for this tensor."""
    for scope in scopes:
        if key in scope:
            found = evaluate_setting(scope[key], name, depth)
            if found is not None:
                return found
    return None


def resolve_settings(
    method: type[TensorMethod],
    wide: Sequence[Settings],
    sources: Sequence[tuple[str, Sequence[Settings], str]],
    name: str,
    depth: Depth,
    required: Sequence[str],
) -> dict[str, Any]:
    """The settings of a method for one tensor.

    `wide` are the scopes of method-level settings, narrowest first; `sources` has, for each expert,
    its name, its scopes, and what the tensor is called there. Raises RecipeError for a missing setting.
    """
    found: dict[str, Any] = {}
    for key, setting in setting_fields(method).items():
        if is_per_expert(setting):
            found[key] = tuple(
                _or_default(lookup(scopes, key, own_name, depth), key, setting, expert, name, required)
                for expert, scopes, own_name in sources
            )
        else:
            found[key] = _or_default(lookup(wide, key, name, depth), key, setting, None, name, required)
    return found


def _or_default(
    value: Scalar | None,
    key: str,
    setting: Field[Any],
    expert: str | None,
    name: str,
    required: Sequence[str],
) -> Any:
    if value is not None:
        return float(value) if is_per_expert(setting) else value
    default = MISSING if key in required else default_of(setting)
    if default is MISSING:
        of = f" of expert {expert!r}" if expert else ""
        raise RecipeError(f"settings.{key}{of}: no value for {name}, and no default; give one")
    return default


def check_settings(method_name: str, method: type[TensorMethod], settings: Settings, where: str, narrow: bool) -> None:
    """Refuse settings that the method does not have, or whose values are of a wrong type.

    `narrow`: these are the settings of one expert, where only per-expert settings mean something.
    """
    known = setting_fields(method)
    for key, value in settings.items():
        if key not in known:
            raise RecipeError(f"{where}.{key}: {method_name} has no such setting; {nearest(key, known)}")
        if narrow and not is_per_expert(known[key]):
            raise RecipeError(f"{where}.{key}: this setting of {method_name} is for all experts; move it to settings")
        kind = float if is_per_expert(known[key]) else get_type_hints(method)[key]
        for leaf in _leaves(value):
            try:
                # Words are no numbers, and what is checked is used as it stands, so 2.0 is no integer.
                TypeAdapter(kind).validate_python(leaf, strict=isinstance(leaf, bool | str) or kind is int)
            except ValidationError as problem:
                said = problem.errors()[0]["msg"]
                raise RecipeError(f"{where}.{key}: found {leaf!r}; {said[0].lower()}{said[1:]}") from None


def _leaves(setting: Setting) -> list[Any]:
    if not isinstance(setting, list):
        return [setting]
    return [leaf for item in setting for leaf in _leaves(item.value if isinstance(item, Filtered) else item)]
