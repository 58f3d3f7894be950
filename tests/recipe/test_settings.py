"""What a setting is for one tensor: gradients over depth, filters, and which scope counts."""

from typing import Any

import pytest

from raymerge import methods
from raymerge.errors import RecipeError, nearest
from raymerge.recipe.load import load_recipe
from raymerge.recipe.settings import evaluate_setting, resolve_settings


def setting(value: Any) -> Any:
    """A setting as the schema makes it."""
    recipe = load_recipe({"experts": {"a": "b"}, "method": "linear", "settings": {"coefficient": value}})
    return recipe.settings["coefficient"]


@pytest.mark.parametrize(
    ("value", "depth", "expected"),
    [
        (0.3, 0.7, 0.3),
        ([0, 1], 0.0, 0.0),
        ([0, 1], 0.25, 0.25),
        ([0, 1], 1.0, 1.0),
        ([0, 1, 0], 0.25, 0.5),
        ([0, 1, 0], 0.5, 1.0),
        ([0, 1, 0], 0.75, 0.5),
        ([0.4], 0.5, 0.4),
        ([], 0.5, None),
    ],
)
def test_gradients_are_linear_between_their_entries(value: Any, depth: float, expected: float | None) -> None:
    assert evaluate_setting(setting(value), "x", depth) == pytest.approx(expected)


def test_gradients_of_flags_and_words_are_steps() -> None:
    assert [evaluate_setting([True, False], "x", depth) for depth in (0.0, 0.49, 0.99, 1.0)] == [
        True,
        True,
        True,
        False,
    ]


def test_the_first_matching_filter_counts() -> None:
    value = setting(
        [{"filter": "mlp", "value": [0, 1]}, {"filter": "mlp.up", "value": 9}, {"filter": "attn", "value": 2}]
    )
    assert evaluate_setting(value, "layers.1.mlp.up.weight", 0.5) == 0.5
    assert evaluate_setting(value, "layers.1.attn.q", 0.5) == 2
    assert evaluate_setting(value, "norm.weight", 0.5) is None
    assert evaluate_setting(setting([{"filter": "a", "value": 1}, {"filter": "*", "value": 3}]), "norm", 0) == 3
    assert evaluate_setting(setting({"value": 4}), "norm", 0) == 4


def resolve(*scopes: dict[str, Any], name: str = "mlp", wide: Any = ()) -> dict[str, Any]:
    recipe_scopes = [{key: setting(value) for key, value in scope.items()} for scope in scopes]
    return resolve_settings(methods.find("linear"), list(wide), [("a", recipe_scopes, name)], name, 0.5, ())


def test_narrow_scopes_come_first_and_fall_through() -> None:
    assert resolve({"coefficient": 1}, {"coefficient": 2})["coefficient"] == (1,)
    assert resolve({}, {"coefficient": 2})["coefficient"] == (2,)
    only_attention = {"coefficient": [{"filter": "attn", "value": 1}]}
    assert resolve(only_attention, {"coefficient": 2})["coefficient"] == (2,)
    assert resolve(only_attention, {"coefficient": 2}, name="attn")["coefficient"] == (1,)
    assert resolve(only_attention)["coefficient"] == (1.0,)  # the method's own default
    assert resolve(wide=[{}, {"normalize": False}])["normalize"] is False
    assert resolve()["normalize"] is True


def test_a_setting_without_a_default_must_be_given() -> None:
    with pytest.raises(RecipeError, match="settings.coefficient of expert 'a': no value for mlp, and no default"):
        resolve_settings(methods.find("linear"), [], [("a", [{}], "mlp")], "mlp", 0.0, ["coefficient"])


def test_filters_see_what_an_expert_calls_its_tensor() -> None:
    scopes = [{"coefficient": setting([{"filter": "bert.", "value": 5}])}]
    found = resolve_settings(methods.find("linear"), [], [("a", scopes, "bert.x"), ("b", scopes, "x")], "x", 0.0, ())
    assert found["coefficient"] == (5, 1.0)


def test_nearest() -> None:
    assert nearest("densty", ["density", "scale"]) == "did you mean 'density'?"
    assert nearest("zzz", ["density", "scale"]) == "it knows density, scale"
    assert nearest("zzz", []) == "it has none"
