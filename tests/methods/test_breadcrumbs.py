"""Breadcrumbs: the band between outliers and small entries, by row or by tensor."""

import numpy as np
import pytest
import torch
from references import assert_near, deltas, doubles, elect_and_merge, family, keep_band

from raymerge.methods.base import merge_whole
from raymerge.methods.breadcrumbs import Breadcrumbs, BreadcrumbsTies


def test_worked_example():
    base, expert = torch.zeros(10), torch.arange(1.0, 11.0)
    method = Breadcrumbs(coefficient=(1.0,), density=(0.3,), gamma=(0.2,), trim_scope="tensor")
    # 10 and 9 are outliers; 8, 7 and 6 are kept.
    assert merge_whole(method, base, [expert]).tolist() == [0, 0, 0, 0, 0, 6, 7, 8, 0, 0]


@pytest.mark.parametrize("cls", [Breadcrumbs, BreadcrumbsTies])
@pytest.mark.parametrize("scope", ["row", "tensor"])
@pytest.mark.parametrize("gamma", [0.0, 0.01, 0.1, 0.9])
def test_reference(cls, scope, gamma):
    base, experts = family((9, 40), 2)
    weights, densities = (0.6, -0.4), (0.15, 0.5)
    method = cls(coefficient=weights, density=densities, gamma=(gamma,) * 2, trim_scope=scope)

    def band(delta, density):
        if scope == "tensor":
            return keep_band(delta, density, gamma)
        return np.stack([keep_band(row, density, gamma) for row in delta])

    kept = [w * band(d, q) for w, d, q in zip(weights, deltas(base, experts), densities, strict=True)]
    mixed = elect_and_merge(kept, [1.0, 1.0]) if cls is BreadcrumbsTies else sum(kept)
    assert_near(merge_whole(method, base, experts), doubles(base)[0] + mixed)


def test_equal_entries_are_ranked_by_position_across_chunks():
    base, expert = torch.zeros(1000), torch.ones(1000)
    method = Breadcrumbs(coefficient=(1.0,), density=(0.4,), gamma=(0.1,), trim_scope="tensor")
    kept = merge_whole(method, base, [expert], chunk=64).nonzero().flatten()
    assert kept.tolist() == list(range(500, 900))


def test_no_outliers_of_a_small_tensor_does_not_empty_it():
    # A known bug elsewhere: gamma * n < 1 dropped everything.
    base, expert = torch.zeros(50), torch.arange(1.0, 51.0)
    method = Breadcrumbs(coefficient=(1.0,), density=(0.5,), gamma=(0.01,), trim_scope="tensor")
    assert int(merge_whole(method, base, [expert]).count_nonzero()) == 25


def test_density_one_keeps_the_task_vector():
    base, experts = family((6, 7), 1)
    for scope in ("row", "tensor"):
        merged = merge_whole(
            Breadcrumbs(coefficient=(1.0,), density=(1.0,), gamma=(0.1,), trim_scope=scope), base, experts
        )
        assert_near(merged, doubles(*experts)[0])
