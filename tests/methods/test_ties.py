"""TIES against a reference that sorts and loops, and the cases where implementations disagree."""

from typing import Any

import pytest
import torch
from instances import exact, instance
from torch import Tensor

from raymerge.errors import RecipeError
from raymerge.methods.base import merge_whole


def reference(
    base: Tensor,
    experts: list[Tensor],
    coefficient: tuple[float, ...],
    density: tuple[float, ...],
    trim_scope: str,
    divisor: str,
    rescale: str = "none",
    scale: float = 1.0,
) -> Tensor:
    """TIES entry by entry, in Python's floats."""
    origin = base.flatten().tolist()
    entries = []
    for expert, c, d in zip(experts, coefficient, density, strict=True):
        delta = (expert - base).double().flatten().tolist()
        count = max(1, int(d * len(delta)))
        order = sorted(range(len(delta)), key=lambda i: (-abs(delta[i]), i))
        if trim_scope == "tensor":
            kept = set(order[:count])
        else:
            kept = {i for i, x in enumerate(delta) if abs(x) >= abs(delta[order[count - 1]])}
        sparse = [x if i in kept else 0.0 for i, x in enumerate(delta)]
        before, after = sum(map(abs, delta)), sum(map(abs, sparse))
        factor = before / after if rescale == "l1" and min(before, after) >= 1e-7 else 1.0
        entries.append([c * factor * x for x in sparse])
    merged = []
    for i, b in enumerate(origin):
        votes = [entry[i] for entry in entries]
        sign = 1 if sum(votes) >= 0 else -1
        agreeing = [e for e, vote in enumerate(votes) if vote * sign > 0]
        total = sum(votes[e] for e in agreeing)
        below = {"none": 1, "count": len(agreeing), "coefficient": sum(coefficient[e] for e in agreeing)}[divisor]
        merged.append(b + scale * total / (below or 1))
    return torch.tensor(merged, dtype=torch.float64).view(base.shape)


def test_a_worked_example() -> None:
    base = torch.tensor([1.0, 1, 1, 1])
    first = base + torch.tensor([4.0, -1, 3, 0.5])
    second = base + torch.tensor([2.0, 1, -5, 0.25])
    # Half is kept: (4, ., 3, .) and (2, ., -5, .); plus and minus are elected; means 3 and -5.
    merged = merge_whole(instance("ties", 2, density=0.5), base, [first, second])
    assert merged.tolist() == [4, 1, -4, 1]
    # The vote is weighed: with 2 for the first expert, plus wins in the third entry.
    heavy = merge_whole(instance("ties", 2, density=0.5, coefficient=(2.0, 1.0)), base, [first, second])
    assert heavy.tolist() == [1 + (8 + 2) / 2, 1, 7, 1]
    shares = instance("ties", 2, density=0.5, coefficient=(2.0, 1.0), divisor="coefficient")
    assert merge_whole(shares, base, [first, second]).tolist() == pytest.approx([1 + (8 + 2) / 3, 1, 1 + 6 / 2, 1])


@pytest.mark.parametrize("trim_scope", ["model", "tensor"])
@pytest.mark.parametrize("divisor", ["none", "count", "coefficient"])
@pytest.mark.parametrize("rescale", ["none", "l1"])
@pytest.mark.parametrize("coefficient", [(1.0, 1.0, 1.0), (0.7, -0.3, 1.5)])
def test_it_is_the_reference(trim_scope: str, divisor: str, rescale: str, coefficient: tuple[float, ...]) -> None:
    base, experts = exact((23, 17), 3, grid=16)
    settings: dict[str, Any] = {
        "coefficient": coefficient,
        "density": (0.2, 0.5, 1.0),
        "trim_scope": trim_scope,
        "divisor": divisor,
        "rescale": rescale,
        "scale": 0.75,
    }
    expected = reference(base, experts, **settings)
    for chunk in (None, 50, 1):
        merged = merge_whole(instance("ties", 3, **settings), base, experts, chunk=chunk)
        # Where votes nearly cancel, rescaling could turn them by rounding: the grid makes that visible.
        assert torch.allclose(merged.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("trim_scope", ["model", "tensor"])
def test_half_precision_selects_exactly(dtype: torch.dtype, trim_scope: str) -> None:
    base, experts = exact((19, 11), 2, seed=3)
    base, experts = base.to(dtype), [expert.to(dtype) for expert in experts]
    settings: dict[str, Any] = {
        "coefficient": (1.0, -0.5),
        "density": (0.3, 0.6),
        "trim_scope": trim_scope,
        "divisor": "count",
    }
    merged = merge_whole(instance("ties", 2, **settings), base, experts, chunk=40)
    assert merged.dtype == dtype
    assert torch.allclose(merged.double(), reference(base, experts, **settings), rtol=2e-2, atol=2e-2)


def test_of_equal_magnitudes_the_first_are_kept_or_all() -> None:
    base = torch.zeros(6)
    expert = torch.tensor([1.0, -2, 2, -2, 2, 0])
    first = instance("ties", 1, density=0.5, trim_scope="tensor")
    every = instance("ties", 1, density=0.5, trim_scope="model")
    for chunk in (None, 2, 1):
        assert merge_whole(first, base, [expert], chunk=chunk).tolist() == [0, -2, 2, -2, 0, 0]
        assert merge_whole(every, base, [expert], chunk=chunk).tolist() == [0, -2, 2, -2, 2, 0]


def test_density_times_count_is_cut_as_floats_are() -> None:
    base, expert = torch.zeros(100), torch.arange(1.0, 101)
    assert 0.29 * 100 < 29
    merged = merge_whole(instance("ties", 1, density=0.29), base, [expert])
    assert int((merged != 0).sum()) == 28


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("trim_scope", ["model", "tensor"])
def test_of_few_entries_one_is_kept_at_least(count: int, trim_scope: str) -> None:
    expert = torch.arange(1.0, count + 1)
    merged = merge_whole(instance("ties", 1, density=0.1, trim_scope=trim_scope), torch.zeros(count), [expert])
    assert merged.tolist() == [0] * (count - 1) + [count]


def test_density_one_keeps_all() -> None:
    base, experts = exact((5, 7), 1)
    method = instance("ties", 1, density=1.0, rescale="l1")
    assert method.rounds(torch.float32) == 0  # type: ignore[attr-defined]
    assert torch.equal(merge_whole(method, base, experts), experts[0])


def test_a_vote_of_zero_elects_plus() -> None:
    base = torch.zeros(2)
    experts = [torch.tensor([3.0, -3]), torch.tensor([-3.0, 3])]
    assert merge_whole(instance("ties", 2, density=1.0), base, experts).tolist() == [3, 3]
    experts = [torch.tensor([2.0, 1]), torch.tensor([1.0, -1]), torch.tensor([-3.0, 0])]
    assert merge_whole(instance("ties", 3, density=1.0), base, experts).tolist() == [1.5, 1]


def test_divisors_that_cancel_do_not_divide() -> None:
    base = torch.zeros(1)
    experts = [torch.tensor([2.0]), torch.tensor([-2.0])]
    # 1 * 2 and -1 * -2 agree; their coefficients add up to zero.
    method = instance("ties", 2, density=1.0, coefficient=(1.0, -1.0), divisor="coefficient")
    assert merge_whole(method, base, experts).tolist() == [4]


@pytest.mark.parametrize("rescale", ["none", "l1"])
@pytest.mark.parametrize("trim_scope", ["model", "tensor"])
def test_unchanged_experts_change_nothing(rescale: str, trim_scope: str) -> None:
    base = torch.randn(4, 3)
    method = instance("ties", 2, rescale=rescale, trim_scope=trim_scope)
    assert torch.equal(merge_whole(method, base, [base, base]), base)


@pytest.mark.parametrize("shape", [(), (1,), (6,), (6, 1), (1, 6), (2, 3, 1)])
def test_any_shape(shape: tuple[int, ...]) -> None:
    base, experts = exact(shape, 2, seed=5)
    for trim_scope in ("model", "tensor"):
        settings: dict[str, Any] = {"coefficient": (1.0, 2.0), "density": (0.5, 0.4), "trim_scope": trim_scope}
        merged = merge_whole(instance("ties", 2, **settings), base, experts, chunk=4)
        assert merged.shape == shape
        assert torch.allclose(merged.double(), reference(base, experts, divisor="count", **settings))


@pytest.mark.parametrize("density", [0.0, -0.5, 1.5])
def test_densities_outside_are_refused(density: float) -> None:
    with pytest.raises(RecipeError, match="density"):
        instance("ties", 1, density=density)
