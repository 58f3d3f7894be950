"""DELLA: keep-probabilities by rank in the row, in distribution; rescaling, exactly."""

import numpy as np
import pytest
import torch
from references import assert_near

from raymerge.errors import RecipeError
from raymerge.methods.base import merge_whole
from raymerge.methods.della import Della, DellaLinear


def test_keep_probability_rises_linearly_with_rank():
    rows, width = 20_000, 11
    values = torch.arange(1.0, width + 1).repeat(rows, 1)
    method = DellaLinear(coefficient=(1.0,), density=(0.5,), epsilon=(0.2,), rescale="none")
    kept = (merge_whole(method, torch.zeros_like(values), [values]) != 0).double().mean(0).numpy()
    expected = np.linspace(0.3, 0.7, width)
    # Five standard deviations of a mean of 20000 Bernoulli draws.
    assert np.abs(kept - expected).max() < 5 * 0.5 / rows**0.5


def test_kept_entries_are_divided_by_their_probability():
    values = torch.arange(1.0, 12.0).repeat(50, 1)
    merged = merge_whole(
        DellaLinear(coefficient=(2.0,), density=(0.5,), epsilon=(0.2,)), torch.zeros_like(values), [values]
    )
    expected = 2 * values.double().numpy() / np.linspace(0.3, 0.7, 11)
    assert_near(merged, np.where(merged.numpy() != 0, expected, 0))


def test_l1_rescaling_keeps_the_norm():
    values = torch.rand(300, 40, generator=torch.Generator().manual_seed(0))
    method = DellaLinear(coefficient=(1.0,), density=(0.3,), epsilon=(0.1,), rescale="l1")
    merged = merge_whole(method, torch.zeros_like(values), [values])
    assert float(merged.abs().sum()) == pytest.approx(float(values.abs().sum()), rel=1e-5)


def test_one_row_of_a_vector_and_rows_of_one_entry():
    generator = torch.Generator().manual_seed(0)
    method = DellaLinear(coefficient=(1.0,), density=(0.5,), epsilon=(0.2,), rescale="none")
    column = 1 + torch.rand(20_000, 1, generator=generator)
    # One entry has no rank: it is kept with the density itself.
    assert abs(float((merge_whole(method, torch.zeros_like(column), [column]) != 0).double().mean()) - 0.5) < 0.02
    vector = 1 + torch.rand(20_000, generator=generator)
    assert abs(float((merge_whole(method, torch.zeros_like(vector), [vector]) != 0).double().mean()) - 0.5) < 0.02


def test_della_elects_signs():
    base = torch.zeros(40, 50)
    experts = [torch.ones(40, 50), -2 * torch.ones(40, 50)]
    method = Della(coefficient=(1.0, 1.0), density=(0.5, 0.5), epsilon=(0.0, 0.0), rescale="none")
    # Where both are kept the sum is negative and only -2 agrees; where one is kept, it is alone.
    assert {float(x) for x in merge_whole(method, base, experts).flatten()} == {-2.0, 0.0, 1.0}


def test_spread_outside_the_unit_interval_is_refused():
    with pytest.raises(RecipeError, match="must lie in"):
        Della(coefficient=(1.0,), density=(0.9,), epsilon=(0.2,)).check()
