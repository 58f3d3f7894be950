"""Interpolation between an old model and a new one."""

import pytest
import torch
from references import assert_near, doubles, family

from raymerge.errors import RecipeError
from raymerge.methods.base import merge_whole
from raymerge.methods.bcwi import Bcwi


def test_worked_example():
    assert merge_whole(Bcwi(coefficient=(0.25,)), torch.tensor([4.0]), [torch.tensor([8.0])]).tolist() == [5.0]


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_reference(share):
    old, (new,) = family((9, 9), 1)
    before, after = doubles(old, new)
    assert_near(merge_whole(Bcwi(coefficient=(share,)), old, [new]), (1 - share) * before + share * after)


def test_share_is_checked():
    with pytest.raises(RecipeError, match=r"\[0, 1\]"):
        Bcwi(coefficient=(1.5,)).check()
