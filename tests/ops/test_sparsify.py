"""What is kept of a task vector: the same entries as a stable sort keeps, however it is cut."""

from collections.abc import Callable

import pytest
import torch
from references import keep_band, keep_largest, stable_ranks

from raymerge.ops import selection, sparsify


def orders(values: torch.Tensor, ranks: list[int]) -> tuple[selection.Order, ...]:
    located = None
    for _ in range(selection.rank_rounds(values.dtype)):
        total = selection.measure_magnitude_ranks([values], located)
        located = selection.conclude_ranks(total, located, values.dtype, lambda stream, count: ranks)
    return located[0]


def in_chunks(values: torch.Tensor, size: int, keep: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    return torch.cat([keep(chunk) for chunk in values.split(size)])


def values_of(kind: str, dtype: torch.dtype) -> torch.Tensor:
    bell = torch.randn(997, generator=torch.Generator().manual_seed(1))
    return {"bell": bell, "ties": (bell * 3).round() / 4, "zeros": torch.zeros(997)}[kind].to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["bell", "ties", "zeros"])
@pytest.mark.parametrize("size", [1, 100, 997])
@pytest.mark.parametrize("density", [0.002, 0.3, 0.5, 1.0])
def test_the_largest(dtype: torch.dtype, kind: str, size: int, density: float) -> None:
    values = values_of(kind, dtype)
    count = max(1, int(density * values.numel()))
    kept = sparsify.LargestKept(*orders(values, [values.numel() - count]))
    found = in_chunks(values, size, kept.keep)
    assert found.dtype == dtype
    assert torch.equal(found.double(), torch.from_numpy(keep_largest(values.double().numpy(), density)))


@pytest.mark.parametrize("kind", ["bell", "ties", "zeros"])
@pytest.mark.parametrize("size", [13, 997])
@pytest.mark.parametrize(("density", "gamma"), [(0.5, 0.1), (0.9, 0.0), (0.2, 0.7), (1.0, 0.0), (0.5, 0.5)])
def test_a_band(kind: str, size: int, density: float, gamma: float) -> None:
    values = values_of(kind, torch.float32)
    count = values.numel()
    target, top = int(density * count), int(gamma * count)
    low = max(0, count - target - top)
    kept = sparsify.BandKept(*orders(values, [low, low + target]))
    found = in_chunks(values, size, kept.keep)
    assert torch.equal(found.double(), torch.from_numpy(keep_band(values.double().numpy(), density, gamma)))


def test_a_band_of_each_row() -> None:
    values = values_of("ties", torch.float32)[:990].view(9, 110)
    found = sparsify.keep_row_band(values, 20, 70)
    for row, kept in zip(values, found, strict=True):
        ranks = torch.from_numpy(stable_ranks(row.abs().numpy()))
        assert torch.equal(kept, row * ((ranks >= 20) & (ranks < 70)))


def test_chances_rise_with_the_rank() -> None:
    delta = torch.tensor([[0.1, -3.0, 0.2, 1.0, -0.5]])
    found = sparsify.rank_probabilities(delta, 0.5, 0.2)
    assert found == pytest.approx(torch.tensor([[0.3, 0.7, 0.4, 0.6, 0.5]]))
    assert sparsify.rank_probabilities(torch.ones(4, 1), 0.5, 0.2).tolist() == [[0.5]] * 4
