"""SLERP between base and expert."""

import numpy as np
import pytest
import torch
from references import assert_near, doubles, family, slerp

from raymerge.methods.base import merge_whole
from raymerge.methods.slerp import Slerp


def test_worked_example():
    merged = merge_whole(Slerp(t=0.5), torch.tensor([1.0, 0.0]), [torch.tensor([0.0, 1.0])])
    assert_near(merged, np.array([0.5**0.5, 0.5**0.5]))


@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("chunk", [None, 10])
def test_reference(t, chunk):
    base = torch.randn(8, 9, generator=torch.Generator().manual_seed(0))
    expert = torch.randn(8, 9, generator=torch.Generator().manual_seed(1))
    assert_near(merge_whole(Slerp(t=t), base, [expert], chunk=chunk), slerp(*doubles(base, expert), t))


@pytest.mark.parametrize("sign", [1, -1])
def test_nearly_parallel_tensors_are_mixed_linearly(sign):
    base, (expert,) = family((50,), 1)
    expert = sign * (base + 0.001 * expert)
    merged = merge_whole(Slerp(t=0.25), base, [expert])
    assert_near(merged, 0.75 * doubles(base)[0] + 0.25 * doubles(expert)[0])


def test_a_tensor_of_zeros_is_perpendicular():
    merged = merge_whole(Slerp(t=0.5), torch.zeros(2), [torch.tensor([1.0, 2.0])])
    assert_near(merged, np.sin(np.pi / 4) * np.array([1.0, 2.0]))
