"""Karcher mean against the fixed-point iteration on explicit unit vectors, and by its own property."""

import numpy as np
import pytest
import torch
from references import assert_near, doubles

from raymerge.methods.base import merge_whole
from raymerge.methods.karcher import Karcher


def reference(found: list[np.ndarray], steps: int) -> np.ndarray:
    norms = [np.linalg.norm(x) for x in found]
    units = [x / n for x, n in zip(found, norms, strict=True) if n > 1e-5]
    mean = sum(units) / np.linalg.norm(sum(units))
    for _ in range(steps):
        tangent = np.zeros_like(mean)
        for unit in units:
            cosine = np.clip((mean * unit).sum(), -1, 1)
            angle = np.arccos(cosine)
            if angle > 1e-5:
                tangent += angle / np.sin(angle) * (unit - cosine * mean) / len(units)
        size = np.linalg.norm(tangent)
        if size < 1e-5:
            break
        mean = np.cos(size) * mean + np.sin(size) * tangent / size
        mean /= np.linalg.norm(mean)
    return mean * np.mean(norms)


def random(count: int) -> list[torch.Tensor]:
    return [(i + 1) * torch.randn(6, 7, generator=torch.Generator().manual_seed(i)) for i in range(count)]


def test_worked_example():
    experts = [torch.tensor([1.0, 0.0]), torch.tensor([0.0, 3.0])]
    assert_near(merge_whole(Karcher(), None, experts), np.array([2**0.5, 2**0.5]))


@pytest.mark.parametrize("count", [2, 3, 5])
@pytest.mark.parametrize("chunk", [None, 10])
def test_reference(count, chunk):
    experts = random(count)
    assert_near(merge_whole(Karcher(), None, experts, chunk=chunk), reference(doubles(*experts), 10), 1e-5)


def test_a_tensor_of_zeros_counts_in_the_scale_only():
    left, right = random(2)
    merged = merge_whole(Karcher(), None, [left, right, torch.zeros_like(left)])
    assert_near(merged, reference(doubles(left, right), 10) * 2 / 3, 1e-5)


def test_one_expert_and_zeros_alone():
    (expert,) = random(1)
    assert torch.equal(merge_whole(Karcher(), None, [expert]), expert)
    assert torch.equal(merge_whole(Karcher(), None, [torch.zeros(3)] * 2), torch.zeros(3))
