"""Multi-SLERP against its own definition: tangent space at the mean direction, and back."""

import numpy as np
import pytest
import torch
from references import assert_near, deltas, doubles, family

from raymerge.errors import RecipeError
from raymerge.methods.base import merge_whole
from raymerge.methods.multislerp import Multislerp


def reference(found: list[np.ndarray], weights: list[float]) -> np.ndarray:
    shares = np.array(weights) / sum(weights)
    norms = [np.linalg.norm(x) for x in found]
    units = [x / n for x, n in zip(found, norms, strict=True)]
    mean = sum(s * u for s, u in zip(shares, units, strict=True))
    mean /= np.linalg.norm(mean)
    tangent = sum(s * (u - (u * mean).sum() * mean) for s, u in zip(shares, units, strict=True))
    angle = np.linalg.norm(tangent) + 1e-12
    direction = mean * np.cos(angle) + tangent * np.sin(angle) / angle
    return direction * sum(s * n for s, n in zip(shares, norms, strict=True))


def test_worked_example():
    experts = [torch.tensor([1.0, 0.0]), torch.tensor([0.0, 3.0])]
    merged = merge_whole(Multislerp(coefficient=(1.0, 1.0)), None, experts)
    assert_near(merged, np.array([2**0.5, 2**0.5]))


@pytest.mark.parametrize("with_base", [True, False])
@pytest.mark.parametrize("chunk", [None, 16])
def test_reference(with_base, chunk):
    base, experts = family((7, 9), 3)
    weights = (0.2, 0.5, 0.9)
    found = deltas(base, experts) if with_base else doubles(*experts)
    merged = merge_whole(Multislerp(coefficient=weights), base if with_base else None, experts, chunk=chunk)
    assert_near(merged, reference(found, list(weights)) + (doubles(base)[0] if with_base else 0), 1e-5)


def test_two_experts_that_cancel_are_averaged_and_three_refused():
    expert = torch.tensor([1.0, 2.0])
    assert merge_whole(Multislerp(coefficient=(1.0, 1.0)), None, [expert, -expert]).tolist() == [0.0, 0.0]
    with pytest.raises(ValueError, match="cancel"):
        merge_whole(Multislerp(coefficient=(1.0, 1.0, 2.0)), None, [expert, expert, -expert])


def test_a_frozen_layer_stays_as_it_is():
    base = torch.tensor([1.0, 2.0])
    assert torch.equal(merge_whole(Multislerp(coefficient=(1.0,) * 3), base, [base] * 3), base)


def test_coefficients_of_sum_zero_are_refused():
    with pytest.raises(RecipeError, match="add up to 0"):
        Multislerp(coefficient=(1.0, -1.0)).check()
