"""Task arithmetic: the formula, its divisors, negation, and half precision."""

import numpy as np
import pytest
import torch
from instances import exact, instance

from raymerge.methods.base import merge_whole


def test_a_worked_example() -> None:
    base = torch.tensor([1.0, 1])
    experts = [torch.tensor([3.0, 1]), torch.tensor([1.0, -3])]
    assert merge_whole(instance("task_arithmetic", 2, coefficient=0.5), base, experts).tolist() == [2, -1]
    doubled = instance("task_arithmetic", 2, coefficient=0.5, scale=2.0)
    assert merge_whole(doubled, base, experts).tolist() == [3, -3]
    # Forgetting: subtract what the first expert learned.
    negated = instance("task_arithmetic", 2, coefficient=(-1.0, 0.0))
    assert merge_whole(negated, base, experts).tolist() == [-1, 1]


@pytest.mark.parametrize("divisor", ["none", "count", "coefficient"])
@pytest.mark.parametrize("coefficient", [(0.3, 0.3, 0.3), (0.7, -0.3, 1.1)])
def test_it_is_the_reference(divisor: str, coefficient: tuple[float, ...]) -> None:
    base, experts = exact((13, 7), 3)
    origin = base.numpy().astype(np.float64)
    mixed = sum(c * (expert.numpy() - origin) for c, expert in zip(coefficient, experts, strict=True))
    below = {"none": 1, "count": 3, "coefficient": sum(coefficient)}[divisor]
    method = instance("task_arithmetic", 3, coefficient=coefficient, divisor=divisor, scale=0.8)
    merged = merge_whole(method, base, experts)
    np.testing.assert_allclose(merged.numpy(), origin + 0.8 * mixed / below, rtol=1e-5, atol=2e-6)
    assert torch.equal(merge_whole(method, base, experts, chunk=6), merged)


def test_the_default_is_the_papers() -> None:
    base, experts = exact((6,), 2)
    expected = base + 0.3 * (experts[0] - base + experts[1] - base)
    assert torch.allclose(merge_whole(instance("task_arithmetic", 2), base, experts), expected)


def test_coefficients_that_cancel_do_not_divide() -> None:
    base = torch.zeros(1)
    method = instance("task_arithmetic", 2, coefficient=(1.0, -1.0), divisor="coefficient")
    assert merge_whole(method, base, [torch.tensor([3.0]), torch.tensor([1.0])]).tolist() == [2]


def test_half_precision_rounds_sums_once() -> None:
    base, experts = exact((40, 10), 8, seed=2)
    base, experts = base.bfloat16(), [expert.bfloat16() for expert in experts]
    deltas = [(expert - base).double() for expert in experts]
    merged = merge_whole(instance("task_arithmetic", 8, coefficient=0.25), base, experts)
    assert merged.dtype == torch.bfloat16
    mixed = sum(deltas) * 0.25
    # A rounding for the sum and one for adding the base: half a unit in the last place each.
    bound = (mixed.abs() + (base.double() + mixed).abs()) * 2**-8 + 1e-6
    assert torch.all((merged.double() - base.double() - mixed).abs() <= bound)


@pytest.mark.parametrize("shape", [(), (1,), (5, 1), (0, 3)])
def test_any_shape(shape: tuple[int, ...]) -> None:
    base, experts = exact(shape, 1)
    merged = merge_whole(instance("task_arithmetic", 1, coefficient=1.0), base, experts)
    assert merged.shape == shape
    assert torch.equal(merged, experts[0])
