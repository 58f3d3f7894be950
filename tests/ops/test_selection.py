"""Order statistics of streams are those of a sort, to the last bit."""

import numpy as np
import pytest
import torch

from raymerge.ops import selection

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def samples(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    bell = torch.randn(5001, generator=generator)
    found = {
        "bell": bell,
        # Many equal entries: 21 values.
        "ties": (bell * 4).round() / 8,
        "constant": torch.full((300,), -0.125),
        "one": torch.tensor([2.5]),
        "tiny": bell * torch.finfo(dtype).tiny / 4,
        "near": 1 + bell * 4 * torch.finfo(torch.float32).eps,
        "signed_zeros": torch.tensor([0.0, -0.0, 1.0, -0.0, -1.0, 0.0]),
        "huge": bell * float(torch.finfo(dtype).max) / 8,
    }
    return {name: value.to(dtype) for name, value in found.items()}


def chunks(values: torch.Tensor, size: int) -> list[torch.Tensor]:
    return list(values.split(size))


def ranks_of(values: torch.Tensor, ranks: list[int], size: int) -> tuple[selection.Order, ...]:
    located = None
    for _ in range(selection.rank_rounds(values.dtype)):
        total = sum(selection.measure_ranks([chunk], located) for chunk in chunks(values, size))
        located = selection.conclude_ranks(total, located, values.dtype, lambda stream, count: ranks)
    return located[0]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("kind", samples(torch.float32))
@pytest.mark.parametrize("size", [1000, 5001])
def test_ranks_are_those_of_a_sort(dtype: torch.dtype, kind: str, size: int) -> None:
    values = samples(dtype)[kind]
    wide = values.double().numpy()
    in_order = np.sort(wide)
    ranks = sorted({0, 1, len(wide) // 3, len(wide) // 2, len(wide) - 2, len(wide) - 1} & set(range(len(wide))))
    for rank, found in zip(ranks, ranks_of(values, ranks, size), strict=True):
        assert found.value == in_order[rank]
        if found.value != 0:  # -0.0 and 0.0 compare equal and have a bin each
            assert found.below == rank - np.sum(wide < found.value)
            assert found.equal == np.sum(wide == found.value)


@pytest.mark.parametrize("dtype", FLOATS)
def test_the_rank_past_the_last_has_all_entries_below(dtype: torch.dtype) -> None:
    values = samples(dtype)["ties"]
    (found,) = ranks_of(values, [values.numel()], 700)
    assert found.value == float(values.max())
    assert found.below == found.equal == int((values == values.max()).sum())


@pytest.mark.parametrize("dtype", FLOATS)
def test_bits_are_ordered_as_the_floats(dtype: torch.dtype) -> None:
    values = torch.cat([value for value in samples(dtype).values()] + [torch.tensor([-torch.inf, torch.inf]).to(dtype)])
    ordered = values.sort().values
    bits = selection.ordered_bits(ordered).tolist()
    rises = (ordered[1:].double() > ordered[:-1].double()).tolist()
    for i, rise in enumerate(rises):
        assert not rise or bits[i + 1] > bits[i]


@pytest.mark.parametrize("dtype", FLOATS)
def test_the_histogram_of_magnitudes(dtype: torch.dtype) -> None:
    for values in samples(dtype).values():
        found = selection.magnitude_histogram(values)
        assert torch.equal(found, selection.coarse_histogram(values.abs()))
        assert int(found.sum()) == values.numel()


def test_streams_keep_apart() -> None:
    streams = [torch.arange(10.0), -torch.arange(20.0)]
    located = None
    for _ in range(2):
        total = selection.measure_ranks(streams, located)
        located = selection.conclude_ranks(total, located, torch.float32, lambda stream, count: [0, count - 1])
    assert [[order.value for order in row] for row in located] == [[0, 9], [-19, 0]]


def test_float64_is_refused() -> None:
    with pytest.raises(TypeError, match="float32 or a 16-bit float"):
        selection.ordered_bits(torch.zeros(2, dtype=torch.float64))


@pytest.mark.parametrize("size", [0, 1, 4, 7, 100])
def test_a_quota_takes_the_first(size: int) -> None:
    mask = (torch.arange(50) % 3 == 0).float()
    quota = selection.Quota(size)
    taken = torch.cat([quota.take(part) for part in mask.split(11)])
    expected = torch.zeros(50)
    expected[torch.nonzero(mask).flatten()[:size]] = 1
    assert torch.equal(taken, expected)
    assert quota.left == size - int(expected.sum())


def test_ranks_in_rows_are_stable() -> None:
    magnitude = (torch.randn(6, 40, generator=torch.Generator().manual_seed(0)) * 2).round().abs()
    found = selection.row_ranks(magnitude).numpy()
    for row, ranks in zip(magnitude.numpy(), found, strict=True):
        assert np.array_equal(np.argsort(ranks), np.argsort(row, kind="stable"))
