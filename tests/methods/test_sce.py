"""SCE: select by variance, weigh by energy, erase minorities."""

import numpy as np
import pytest
import torch
from references import assert_near, deltas, doubles, family

from raymerge.methods.base import merge_whole
from raymerge.methods.sce import Sce


def reference(found: list[np.ndarray], topk: float) -> np.ndarray:
    stack = np.stack(found)
    if topk < 1:
        variance = stack.var(axis=0)
        count = int(np.count_nonzero(variance) * topk)
        kept = np.zeros(variance.size)
        kept[np.argsort(-variance.ravel(), kind="stable")[:count]] = 1
        stack = stack * kept.reshape(variance.shape)
    energy = (stack**2).reshape(len(stack), -1).mean(axis=1)
    share = energy / energy.sum() if energy.sum() >= 1e-6 else np.full(len(stack), 1 / len(stack))
    elected = np.where(stack.sum(axis=0) >= 0, 1.0, -1.0)
    weight = share.reshape(-1, *[1] * found[0].ndim) * (np.sign(stack) == elected)
    return (stack * weight).sum(0) / np.maximum(weight.sum(0), 1e-6)


@pytest.mark.parametrize("topk", [1.0, 0.5, 0.1])
@pytest.mark.parametrize("chunk", [None, 64])
def test_reference(topk, chunk):
    base, experts = family((15, 17), 3)
    merged = merge_whole(Sce(select_topk=topk), base, experts, chunk=chunk)
    assert_near(merged, doubles(base)[0] + reference(deltas(base, experts), topk), 1e-5)


def test_worked_example():
    base = torch.zeros(2)
    # Energies 4 and 1 give shares 0.8 and 0.2; in the first entry both agree, in the second plus wins.
    experts = [torch.tensor([2.0, 2.0]), torch.tensor([1.0, -1.0])]
    assert_near(merge_whole(Sce(), base, experts), np.array([0.8 * 2 + 0.2 * 1, 2.0]))


def test_nothing_selected_leaves_the_base():
    base, experts = family((5, 5), 2)
    assert torch.equal(merge_whole(Sce(select_topk=0.0), base, experts), base)
