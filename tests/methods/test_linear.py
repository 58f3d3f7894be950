"""Weighted averages: the formula, its divisor, and float32 arithmetic whatever the dtype."""

import numpy as np
import pytest
import torch
from instances import exact, instance

from raymerge.errors import RecipeError
from raymerge.methods.base import merge_whole


def test_a_worked_example() -> None:
    experts = [torch.tensor([1.0, 2]), torch.tensor([5.0, -2])]
    assert merge_whole(instance("linear", 2), None, experts).tolist() == [3, 0]
    assert merge_whole(instance("linear", 2, coefficient=(3.0, 1.0)), None, experts).tolist() == [2, 1]
    plain = instance("linear", 2, coefficient=(3.0, -1.0), normalize=False)
    assert merge_whole(plain, None, experts).tolist() == [-2, 8]


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("coefficient", [(1.0, 1.0, 1.0), (0.7, -0.3, 0.2), (0.0, 2.0, 1.0)])
def test_it_is_the_reference(normalize: bool, coefficient: tuple[float, ...]) -> None:
    _, experts = exact((13, 7), 3)
    expected = sum(c * expert.numpy().astype(np.float64) for c, expert in zip(coefficient, experts, strict=True))
    expected = expected / sum(coefficient) if normalize else expected
    method = instance("linear", 3, coefficient=coefficient, normalize=normalize)
    merged = merge_whole(method, None, experts)
    np.testing.assert_allclose(merged.numpy(), expected, rtol=1e-5, atol=2e-6)
    assert torch.equal(merge_whole(method, None, experts, chunk=5), merged)


def test_the_base_is_not_read() -> None:
    _, experts = exact((4,), 2)
    method = instance("linear", 2)
    assert not method.uses_base and not method.needs_base
    assert torch.equal(merge_whole(method, torch.full((4,), 99.0), experts), merge_whole(method, None, experts))


def test_experts_are_left_as_they_are() -> None:
    _, experts = exact((4,), 2)
    before = [expert.clone() for expert in experts]
    merge_whole(instance("linear", 2, coefficient=3.0), None, experts)
    assert all(torch.equal(*pair) for pair in zip(before, experts, strict=True))


def test_one_expert_is_itself() -> None:
    _, experts = exact((3, 5), 1)
    assert torch.equal(merge_whole(instance("linear", 1), None, experts), experts[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rounds_once(dtype: torch.dtype) -> None:
    _, experts = exact((50, 20), 9, seed=1)
    experts = [expert.to(dtype) for expert in experts]
    merged = merge_whole(instance("linear", 9), None, experts)
    expected = torch.stack([expert.double() for expert in experts]).mean(0)
    half = torch.finfo(dtype).eps / 2
    assert merged.dtype == dtype
    assert torch.all((merged.double() - expected).abs() <= expected.abs() * half * 1.01 + 1e-6)


@pytest.mark.parametrize("shape", [(), (1,), (5, 1), (0, 3)])
def test_any_shape(shape: tuple[int, ...]) -> None:
    _, experts = exact(shape, 2)
    merged = merge_whole(instance("linear", 2), None, experts)
    assert merged.shape == shape
    assert torch.allclose(merged, (experts[0] + experts[1]) / 2)


def test_coefficients_that_cancel_are_refused() -> None:
    with pytest.raises(RecipeError, match="add up to 0"):
        instance("linear", 2, coefficient=(1.0, -1.0))
    instance("linear", 2, coefficient=(1.0, -1.0), normalize=False)
