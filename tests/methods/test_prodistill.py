"""What ProDistill starts from, and which settings it refuses; what it learns is tested in tests/distill/."""

import pytest
import torch
from references import assert_near, deltas, doubles, family

from raymerge.errors import RecipeError
from raymerge.methods.base import merge_whole
from raymerge.methods.prodistill import Prodistill


def test_a_worked_example() -> None:
    base, experts = torch.tensor([1.0, 2.0]), [torch.tensor([2.0, 2.0]), torch.tensor([1.0, 4.0])]
    assert Prodistill(coefficient=(0.5, 0.25)).merge(base, experts).tolist() == [1.5, 2.5]


def test_the_start_is_task_arithmetic() -> None:
    base, experts = family((6, 50), 3)
    coefficients = (0.3, 0.5, -0.2)
    found = merge_whole(Prodistill(coefficient=coefficients), base, experts, chunk=64)
    (expected,) = doubles(base)
    for c, delta in zip(coefficients, deltas(base, experts), strict=True):
        expected = expected + c * delta
    assert_near(found, expected)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"epochs": -1}, "settings.epochs: found -1; 0 or more is expected"),
        ({"batch_size": 0}, "settings.batch_size: found 0; 1 or more is expected"),
        ({"lr": 0.0}, "settings.lr: found 0.0; a number above 0 is expected"),
        ({"plateau": 1.0}, "settings.plateau: found 1.0"),
        ({"correction_epochs": 3}, "settings.correction_epochs: corrects schedule: parallel; the others need none"),
    ],
    ids=str,
)
def test_settings_that_mean_nothing(settings: dict, said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        Prodistill(coefficient=(0.3,), **settings).check()
