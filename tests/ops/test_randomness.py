"""Draws depend on the seed, the tensor and the expert, never on how a tensor is cut."""

import pytest
import torch

from raymerge.ops.randomness import Draws


@pytest.mark.parametrize("sizes", [(1000,), (4, 996), (1, 2, 3, 994), (333, 333, 334), (7,) * 142 + (6,)])
def test_any_cut_draws_the_same(sizes: tuple[int, ...]) -> None:
    whole = Draws(5, "w", "a").uniform(1000)
    draws = Draws(5, "w", "a")
    assert torch.equal(torch.cat([draws.uniform(size) for size in sizes]), whole)


@pytest.mark.parametrize("other", [(6, "w", "a"), (5, "v", "a"), (5, "w", "b"), (5, "wa", "")])
def test_another_key_draws_other_numbers(other: tuple[int, str, str]) -> None:
    ours, theirs = Draws(5, "w", "a").uniform(4000).float(), Draws(*other).uniform(4000).float()
    assert not torch.equal(ours, theirs)
    assert abs(float(torch.corrcoef(torch.stack([ours, theirs]))[0, 1])) < 0.08


def test_numbers_are_uniform() -> None:
    drawn = Draws(1, "w", "a").uniform(1 << 18).double()
    counts = torch.histc(drawn, bins=64, min=-32768, max=32768)
    expected = (1 << 18) / 64
    # Chi-square of 63 degrees of freedom; 120 is beyond 1 in 10 000.
    assert float(((counts - expected).square() / expected).sum()) < 120


@pytest.mark.parametrize("probability", [0.0, 1e-3, 0.3, 0.5, 0.999, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_mask_has_its_probability(probability: float, dtype: torch.dtype) -> None:
    count = 1 << 18
    like = torch.zeros(512, 512, dtype=dtype)
    mask = Draws(2, "w", "a").bernoulli(like, probability)
    assert mask.shape == like.shape and mask.dtype == dtype
    share = float(mask.float().mean())
    assert abs(share - probability) <= 5 * (probability * (1 - probability) / count) ** 0.5 + 1 / 65536
    assert probability not in (0.0, 1.0) or share == probability


def test_a_probability_for_each_entry() -> None:
    probability = torch.tensor([0.0, 0.25, 0.75, 1.0]).repeat(20000, 1)
    mask = Draws(3, "w", "a").bernoulli(torch.zeros(20000, 4), probability)
    assert mask.mean(0) == pytest.approx(torch.tensor([0, 0.25, 0.75, 1]), abs=0.02)
    assert mask[:, 0].sum() == 0 and mask[:, 3].sum() == 20000
    same = Draws(3, "w", "a").bernoulli(torch.zeros(20000, 4), torch.full((20000, 4), 0.3))
    assert torch.equal(same, Draws(3, "w", "a").bernoulli(torch.zeros(20000, 4), 0.3))
