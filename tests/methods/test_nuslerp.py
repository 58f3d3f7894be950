"""NuSLERP over tensors, rows and columns, of experts or of their task vectors."""

import numpy as np
import pytest
import torch
from references import assert_near, deltas, doubles, family, slerp

from raymerge.methods.base import merge_whole
from raymerge.methods.nuslerp import Nuslerp


def test_worked_example():
    experts = [torch.tensor([2.0, 0.0]), torch.tensor([0.0, 2.0])]
    merged = merge_whole(Nuslerp(coefficient=(1.0, 1.0)), None, experts)
    assert_near(merged, np.array([2**0.5, 2**0.5]))


@pytest.mark.parametrize("over", ["tensor", "row", "column"])
@pytest.mark.parametrize("with_base", [True, False])
def test_reference(over, with_base):
    base, _ = family((6, 8), 1)
    experts = [torch.randn(6, 8, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)]
    left, right = deltas(base, experts) if with_base else doubles(*experts)
    t = 3.0 / (1.0 + 3.0)
    if over == "tensor":
        expected = slerp(left, right, t)
    elif over == "row":
        expected = np.stack([slerp(a, b, t) for a, b in zip(left, right, strict=True)])
    else:
        expected = np.stack([slerp(a, b, t) for a, b in zip(left.T, right.T, strict=True)]).T
    method = Nuslerp(coefficient=(1.0, 3.0), over=over)
    merged = merge_whole(method, base if with_base else None, experts)
    assert_near(merged, expected + (doubles(base)[0] if with_base else 0), 1e-5)


def test_parallel_experts_are_mixed_linearly():
    expert = torch.tensor([1.0, 2.0])
    for over in ("tensor", "row"):
        merged = merge_whole(Nuslerp(coefficient=(1.0, 1.0), over=over), None, [expert, 3 * expert])
        assert_near(merged, np.array([2.0, 4.0]))


def test_coefficients_that_cancel_mean_one_half():
    assert Nuslerp(coefficient=(1.0, -1.0)).t == 0.5
