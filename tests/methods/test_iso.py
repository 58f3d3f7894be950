"""Isotropic merging: all directions of the merged task matrix are equally strong."""

import numpy as np
import pytest
import torch
from references import assert_near, deltas, doubles, family

from raymerge.errors import RecipeError
from raymerge.methods.base import merge_whole
from raymerge.methods.iso import IsoC, IsoCts


def polar(vectors: np.ndarray) -> np.ndarray:
    u, _, vh = np.linalg.svd(vectors, full_matrices=False)
    return u @ vh


def iso_cts(found: list[np.ndarray], fraction: float) -> np.ndarray:
    u, s, vh = np.linalg.svd(sum(found), full_matrices=False)
    rank, count = len(s), len(found)
    each = round((rank - int(rank * fraction)) / count)
    common = rank - each * count
    space = u[:, :common]
    left, right, strength = [space], [vh[:common].T], [s[:common]]
    for delta in found:
        own_u, own_s, own_vh = np.linalg.svd(delta - space @ space.T @ delta, full_matrices=False)
        left.append(own_u[:, :each])
        right.append(own_vh[:each].T)
        strength.append(own_s[:each])
    return np.concatenate(strength).mean() * polar(np.hstack(left)) @ polar(np.hstack(right)).T


def test_worked_example():
    delta = torch.tensor([[3.0, 0.0], [0.0, 1.0]])
    merged = merge_whole(IsoC(scale=0.5), torch.zeros(2, 2), [delta / 2, delta / 2])
    assert_near(merged, np.eye(2))


@pytest.mark.parametrize("shape", [(12, 12), (8, 20), (20, 8), (1, 9)])
def test_iso_c_reference(shape):
    base, experts = family(shape, 3)
    u, s, vh = np.linalg.svd(sum(deltas(base, experts)), full_matrices=False)
    assert_near(merge_whole(IsoC(scale=1.5), base, experts), doubles(base)[0] + 1.5 * s.mean() * u @ vh, 1e-5)


@pytest.mark.parametrize("fraction", [0.5, 0.8, 1.0])
@pytest.mark.parametrize("shape", [(12, 12), (10, 24), (24, 10)])
def test_iso_cts_reference(shape, fraction):
    base, experts = family(shape, 2)
    merged = merge_whole(IsoCts(common_fraction=fraction), base, experts)
    assert_near(merged, doubles(base)[0] + iso_cts(deltas(base, experts), fraction), 1e-4)


def test_iso_cts_with_more_experts_than_directions():
    base, experts = family((3, 5), 4)
    found = merge_whole(IsoCts(common_fraction=0.1), base, experts) - base
    strengths = torch.linalg.svdvals(found)
    assert torch.allclose(strengths, strengths.mean().expand_as(strengths), rtol=1e-4)


@pytest.mark.parametrize("cls", [IsoC, IsoCts])
@pytest.mark.parametrize("shape", [(7,), (), (2, 3, 4)])
def test_other_tensors_get_the_mean_task_vector(cls, shape):
    base, experts = family(shape, 3)
    assert_near(merge_whole(cls(), base, experts), doubles(base)[0] + sum(deltas(base, experts)) / 3)


def test_common_fraction_is_checked():
    with pytest.raises(RecipeError, match="common_fraction"):
        IsoCts(common_fraction=0.0).check()
