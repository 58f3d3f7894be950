"""Passing one expert through."""

import torch
from references import assert_near, doubles, family

from raymerge.methods.base import merge_whole
from raymerge.methods.passthrough import Passthrough


def test_worked_example():
    assert merge_whole(Passthrough(scale=(0.5,)), None, [torch.tensor([2.0, -4.0])]).tolist() == [1.0, -2.0]


def test_unscaled_bits_are_untouched_and_scaled_ones_reference():
    _, (expert,) = family((9, 9), 1)
    assert torch.equal(merge_whole(Passthrough(scale=(1.0,)), None, [expert]), expert)
    assert_near(merge_whole(Passthrough(scale=(0.3,)), None, [expert]), 0.3 * doubles(expert)[0])
