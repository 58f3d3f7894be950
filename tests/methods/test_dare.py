"""DARE: what is random, in distribution; what follows from it, exactly."""

import numpy as np
import pytest
import torch
from references import assert_near, deltas, doubles, elect_and_merge, family

from raymerge.methods.base import merge_whole
from raymerge.methods.dare import DareLinear, DareTies, DarexQ


def test_worked_example_with_nothing_dropped():
    base = torch.tensor([1.0, 1.0])
    merged = merge_whole(DareLinear(coefficient=(0.5,), density=(1.0,)), base, [torch.tensor([3.0, 0.0])])
    assert merged.tolist() == [2.0, 0.5]


@pytest.mark.parametrize("density", [0.05, 0.3, 0.9])
def test_kept_fraction_mean_and_norm(density):
    base, experts = torch.zeros(400, 500), [1 + torch.rand(400, 500, generator=torch.Generator().manual_seed(1))]
    size = base.numel()
    for rescale, factor in (("inverse_density", 1 / density), ("none", 1.0)):
        merged = merge_whole(DareLinear(coefficient=(1.0,), density=(density,), rescale=rescale), base, experts)
        kept = merged != 0
        # Five standard deviations of a Bernoulli count.
        assert abs(int(kept.sum()) - density * size) < 5 * (density * (1 - density) * size) ** 0.5
        assert_near(merged, np.where(kept.numpy(), factor * experts[0].double().numpy(), 0))
    merged = merge_whole(DareLinear(coefficient=(1.0,), density=(density,), rescale="l1"), base, experts)
    assert float(merged.double().abs().sum()) == pytest.approx(float(experts[0].double().abs().sum()), rel=1e-5)


def test_draws_depend_on_seed_tensor_and_expert_alone():
    base, (expert,) = family((999,), 1)
    method = DareLinear(coefficient=(1.0, 1.0), density=(0.5, 0.5))

    def dropped(**key):
        return merge_whole(method, base, [expert, expert], **key)

    assert torch.equal(dropped(seed=3), dropped(seed=3))
    assert torch.equal(dropped(seed=3), dropped(seed=3, chunk=77))
    assert not torch.equal(dropped(seed=3), dropped(seed=4))
    assert not torch.equal(dropped(tensor="a"), dropped(tensor="b"))
    # The two experts are the same here; were their masks too, every entry would move twice or not at all.
    moved = (dropped() - base) / (expert - base)
    assert sorted({round(float(x)) for x in moved}) == [0, 2, 4]


def test_dare_ties_elects_signs_among_what_is_kept():
    base, experts = family((40, 30), 3)
    weights, densities = (1.0, 0.5, -0.7), (0.4, 0.6, 0.5)
    alone = [
        merge_whole(
            DareLinear(coefficient=tuple(float(i == j) for j in range(3)), density=densities),
            torch.zeros_like(base),
            [expert - base for expert in experts],
        )
        .double()
        .numpy()
        for i in range(3)
    ]
    merged = merge_whole(DareTies(coefficient=weights, density=densities), base, experts)
    mixed = elect_and_merge([w * d for w, d in zip(weights, alone, strict=True)], [1.0] * 3)
    assert_near(merged, doubles(base)[0] + mixed)


def test_darex_q_divides_by_q():
    base, experts = family((30, 30), 1)
    merged = merge_whole(DarexQ(coefficient=(1.0,), density=(0.3,), q=(0.8,)), base, experts)
    moved = merged.double().numpy() - doubles(base)[0]
    expected = deltas(base, experts)[0] / 0.8
    assert_near(torch.from_numpy(moved), np.where(np.abs(moved) > 0, expected, 0))
    assert 0.2 < (moved != 0).mean() < 0.4
