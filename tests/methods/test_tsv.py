"""TSV-Merge: low-rank task matrices with singular vectors made orthogonal."""

import numpy as np
import pytest
import torch
from references import assert_near, deltas, doubles, family

from raymerge.methods.base import merge_whole
from raymerge.methods.tsv import Tsv


def reference(found: list[np.ndarray]) -> np.ndarray:
    rank = max(1, min(found[0].shape) // len(found))
    parts = [np.linalg.svd(delta, full_matrices=False) for delta in found]

    def whitened(vectors: np.ndarray) -> np.ndarray:
        u, _, vh = np.linalg.svd(vectors, full_matrices=False)
        return u @ vh

    u = whitened(np.hstack([u[:, :rank] for u, _, _ in parts]))
    v = whitened(np.hstack([vh[:rank].T for _, _, vh in parts]))
    return u @ np.diag(np.concatenate([s[:rank] for _, s, _ in parts])) @ v.T


def test_worked_example_tasks_in_different_directions_are_added_up():
    experts = [torch.diag(torch.tensor([2.0, 0.0])), torch.diag(torch.tensor([0.0, 3.0]))]
    assert_near(merge_whole(Tsv(), torch.zeros(2, 2), experts), np.diag([2.0, 3.0]))


@pytest.mark.parametrize("shape", [(12, 12), (9, 20), (20, 9)])
def test_reference(shape):
    base, experts = family(shape, 3)
    merged = merge_whole(Tsv(scale=0.7), base, experts)
    assert_near(merged, doubles(base)[0] + 0.7 * reference(deltas(base, experts)), 1e-4)


def test_more_experts_than_directions():
    base, experts = family((2, 5), 3)
    assert bool(merge_whole(Tsv(), base, experts).isfinite().all())


@pytest.mark.parametrize("shape", [(7,), (), (2, 3, 4)])
def test_other_tensors_get_the_mean_task_vector(shape):
    base, experts = family(shape, 3)
    assert_near(merge_whole(Tsv(), base, experts), doubles(base)[0] + sum(deltas(base, experts)) / 3)
