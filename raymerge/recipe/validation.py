"""Check plain data against a schema, and say what is wrong in the words of who wrote the data."""

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from raymerge.errors import RecipeError, nearest
from raymerge.recipe.schema import SECRET

Model = TypeVar("Model", bound=BaseModel)


def validate(model: type[Model], content: Mapping[str, Any], where: str, format_name: str = "") -> Model:
    """The data as a `model`. Raises RecipeError, one line for each unknown key, missing key and wrong type."""
    try:
        return model.model_validate(content)
    except ValidationError as problem:
        lines = _explain(problem, model, content)
        raise RecipeError("\n".join(f"{where}: {said}{format_name}" for said in lines)) from None


def _explain(problem: ValidationError, model: type[BaseModel], content: Any) -> list[str]:
    """One line for each thing that is wrong. Of a value that may be of several types, all are named once."""
    found: dict[str, str] = {}
    expected: dict[str, tuple[Any, list[str]]] = {}
    for error in problem.errors():
        place, choice = _place(error["loc"], content)
        text, said = ".".join(map(str, place)), error["msg"]
        if error["type"] == "extra_forbidden":
            found[text] = f"{text}: unknown key; {nearest(str(place[-1]), _keys_at(model, place[:-1]))}"
        elif error["type"] == "missing":
            text = ".".join(map(str, [*place, error["loc"][-1]]))
            found[text] = f"{text}: missing"
        elif error["type"] == SECRET:
            found[text] = f"{text}: {said}"
        elif choice is None:
            found[text] = f"{text}: {said[0].lower()}{said[1:]}, found {error['input']!r}"
        else:
            outside, written = choice
            kind = said.removeprefix("Input should be ").removeprefix("a valid ")
            expected.setdefault(outside, (written, []))[1].append(kind)
    for outside, (written, kinds) in expected.items():
        if not any(known.startswith(f"{outside}.") for known in found):
            found[outside] = f"{outside}: {' or '.join(dict.fromkeys(kinds))} is expected, found {written!r}"
    return list(found.values())


def _place(location: Sequence[int | str], content: Any) -> tuple[list[int | str], tuple[str, Any] | None]:
    """Where in the recipe as it is written an error is; and, for a value that may be of several types,
    where that value is, and what. pydantic names the type it tried in the location too; users have not
    written it.
    """
    place: list[int | str] = []
    choice: tuple[str, Any] | None = None
    for part in location:
        listed = isinstance(content, list | tuple) and isinstance(part, int) and part < len(content)
        if listed or (isinstance(content, Mapping) and part in content):
            content = content[part]
            place.append(part)
        elif choice is None:
            choice = ".".join(map(str, place)), content
    return place, choice


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
