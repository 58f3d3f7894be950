"""Model Stock: interpolation by the angles between task vectors."""

from itertools import combinations

import numpy as np
import pytest
import torch
from references import assert_near, deltas, doubles, family

from raymerge.methods.base import merge_whole
from raymerge.methods.model_stock import ModelStock


def reference(base: np.ndarray, found: list[np.ndarray]) -> np.ndarray:
    cosines = [
        np.clip((a * b).sum(-1) / max(np.linalg.norm(a) * np.linalg.norm(b), 1e-6), -1, 1)
        for a, b in combinations(found, 2)
    ]
    count, cosine = len(found), np.mean(cosines)
    t = count * cosine / (1 + (count - 1) * cosine)
    return base + t * np.mean(found, axis=0)


def test_worked_example():
    base = torch.zeros(2)
    # An angle of 60 degrees: t = 2 * 0.5 / 1.5.
    experts = [torch.tensor([1.0, 0.0]), torch.tensor([0.5, 3**0.5 / 2])]
    assert_near(merge_whole(ModelStock(), base, experts), np.array([0.75, 3**0.5 / 4]) * 2 / 3)


@pytest.mark.parametrize("chunk", [None, 50])
def test_reference(chunk):
    base, _ = family((12, 20), 1)
    shared = family((12, 20), 1, seed=7)[1][0] - base
    experts = [base + 0.1 * shared + delta - base for delta in family((12, 20), 4)[1]]
    merged = merge_whole(ModelStock(), base, experts, chunk=chunk)
    flat = [d.ravel() for d in deltas(base, experts)]
    assert_near(merged, reference(doubles(base)[0].ravel(), flat).reshape(12, 20), 1e-5)


def test_filter_wise_reference():
    base, experts = family((6, 30), 3)
    experts = [expert + 0.2 for expert in experts]
    rows = zip(doubles(base)[0], *deltas(base, experts), strict=True)
    expected = np.stack([reference(row, list(found)) for row, *found in rows])
    assert_near(merge_whole(ModelStock(filter_wise=True), base, experts), expected, 1e-5)


def test_opposite_task_vectors_leave_the_base():
    base = torch.ones(3)
    experts = [torch.tensor([2.0, 1.0, 1.0]), torch.tensor([0.0, 1.0, 1.0])]
    assert torch.equal(merge_whole(ModelStock(), base, experts), base)
