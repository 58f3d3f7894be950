"""Objectives of a search against numbers worked out by hand."""

import math
from typing import Any

import pytest

from raymerge.errors import RecipeError
from raymerge.evaluate.objectives import Reference, check_objectives, value_of
from raymerge.evaluate.rounds import Outcome
from raymerge.recipe.schema import Search, Task


def outcome(metric: str, score: float, entropy: float = 0.0, predictions: Any = ()) -> Outcome:
    found = dict(enumerate(predictions))
    return Outcome(metric=metric, score=score, num_rows=len(found), entropy=entropy, predictions=found)


CLASSES = {
    "one": outcome("accuracy", 0.8, 0.2, [0, 1, 1, 0]),
    "two": outcome("accuracy", 0.4, 0.6, [2, 2]),
}
OWN = {
    "one": Reference(score=0.9, predictions=dict(enumerate([0, 1, 0, 0]))),
    "two": Reference(score=0.5, predictions=dict(enumerate([2, 1]))),
}


@pytest.mark.parametrize(
    ("objective", "expected"),
    [
        ("mean_score", 0.6),
        ("worst_share_kept", 0.8),
        ("weighted_score", (3 * 0.8 + 0.4) / 4),
        ("entropy", 0.4),
        ("agreement", (0.75 + 0.5) / 2),
    ],
)
def test_objectives_of_classes(objective: Any, expected: float) -> None:
    assert value_of(objective, CLASSES, OWN, {"one": 3.0, "two": 1.0}) == pytest.approx(expected)


def test_objectives_of_texts() -> None:
    texts = {"one": outcome("perplexity", 8.0), "two": outcome("perplexity", 4.0)}
    own = {"one": Reference(score=6.0, predictions={}), "two": Reference(score=4.0, predictions={})}
    assert value_of("perplexity", texts, own, {}) == 6.0
    assert value_of("worst_share_kept", texts, own, {}) == pytest.approx(0.75)
    assert math.isfinite(value_of("entropy", texts, own, {}))


@pytest.mark.parametrize(
    ("search", "kind", "expert", "said"),
    [
        ({"objective": "mean_score"}, "perplexity", "a", "one has perplexity, which is no share of what is right"),
        ({"objective": "perplexity"}, "classification", "a", "no task has kind: perplexity"),
        ({"objective": "agreement"}, "classification", None, "one names no expert to compare with"),
        (
            {"objective": "weighted_score"},
            "classification",
            "a",
            "search.weights: numbers for some of one are expected",
        ),
        (
            {"objective": "weighted_score", "weights": {"tow": 1.0}},
            "classification",
            "a",
            "search.weights: numbers for some of one are expected, found tow",
        ),
    ],
)
def test_objectives_without_a_meaning(search: dict[str, Any], kind: Any, expert: str | None, said: str) -> None:
    task = Task(task="one", kind=kind, data="rows.parquet", expert=expert)
    with pytest.raises(RecipeError, match=said):
        check_objectives(Search(**search), [task])
