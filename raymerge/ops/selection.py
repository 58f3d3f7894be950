"""Exact order statistics of a stream of chunks, in bounded memory.

A float's bits, read as an integer, are ordered as the float is. So a rank is found by radix:
a coarse histogram of the upper 16 bits over all chunks, then a fine histogram of the lower 16
bits of the entries that fall in the one coarse bin where the rank lies. Histograms add up over
chunks, tensors, shards and machines, and the result is exact to the last bit. 16-bit floats
need the coarse pass only. Selecting needs no sort and no copy of the data.

Shapes: P entries of a chunk, R ranks, 65536 bins.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

BINS = 1 << 16
_LOWER = BINS - 1


def ordered_bits(values: Tensor) -> Tensor:
    """Integers ordered as the floats are, int32 in [0, 65536) for 16-bit and full-range for float32.

    -0.0 orders below 0.0. Raises TypeError for a dtype that is not float32 or a 16-bit float.
    """
    if values.element_size() == 2:
        bits = values.contiguous().view(torch.int16)
        flipped = bits ^ (bits >> 15).bitwise_and_(0x7FFF)
        return flipped.to(torch.int32).add_(1 << 15)
    if values.dtype != torch.float32:
        raise TypeError(f"order statistics need float32 or a 16-bit float, found {values.dtype}")
    bits = values.contiguous().view(torch.int32)
    return bits ^ (bits >> 31).bitwise_and_(0x7FFFFFFF)


def coarse_bins(values: Tensor) -> Tensor:
    """The coarse bin of each entry, int32 in [0, 65536)."""
    bits = ordered_bits(values)
    return bits if values.element_size() == 2 else (bits >> 16).add_(1 << 15)


def coarse_histogram(values: Tensor) -> Tensor:
    """Count the entries of a chunk in each coarse bin, int64 (65536,)."""
    return torch.bincount(coarse_bins(values.flatten()), minlength=BINS)


def magnitude_histogram(values: Tensor) -> Tensor:
    """`coarse_histogram(values.abs())` for a chunk; the sign bit is masked, which costs nothing."""
    if values.element_size() == 2:
        bits = values.flatten().view(torch.int16) & 0x7FFF
    else:
        bits = (values.flatten().view(torch.int32) & 0x7FFFFFFF) >> 16
    counts = torch.zeros(BINS, dtype=torch.int64, device=values.device)
    counts[BINS // 2 :] = torch.bincount(bits, minlength=BINS // 2)
    return counts


@dataclass(frozen=True, slots=True)
class Coarse:
    """Where a rank lies after the coarse pass: its bin, and its rank among the entries of that bin."""

    bin: int
    rank: int
    count: int


@dataclass(frozen=True, slots=True)
class Order:
    """An order statistic: the value, and how the entries equal to it are counted.

    Of the `equal` entries that have the value, `below` have a lower rank.
    """

    value: float
    below: int
    equal: int


def locate(histogram: Tensor, rank: int) -> Coarse:
    """Find the bin of the entry with `rank` (0 is the smallest) in a histogram.

    The rank past the last entry is found as well: in the last bin that is not empty, with all its
    entries below.
    """
    cumulative = histogram.cumsum(0)
    last = int(torch.searchsorted(cumulative, cumulative[-1]))
    found = min(last, int(torch.searchsorted(cumulative, rank, right=True)))
    count = int(histogram[found])
    return Coarse(found, rank - int(cumulative[found]) + count, count)


def fine_histogram(values: Tensor, coarse: Coarse) -> Tensor:
    """Count the lower 16 bits of the float32 entries that fall in one coarse bin, int64 (65536,)."""
    bits = ordered_bits(values.flatten())
    inside = bits[(bits >> 16) == coarse.bin - (1 << 15)]
    return torch.bincount(inside & _LOWER, minlength=BINS)


def settle_coarse(coarse: Coarse, dtype: torch.dtype) -> Order:
    """The order statistic of a 16-bit float, whose coarse bin is already its value."""
    bits = coarse.bin - (1 << 15)
    value = torch.tensor([bits ^ ((bits >> 15) & 0x7FFF)], dtype=torch.int16).view(dtype)
    return Order(float(value), coarse.rank, coarse.count)


def settle_fine(coarse: Coarse, histogram: Tensor) -> Order:
    """The order statistic of float32 entries from the fine histogram of its coarse bin."""
    fine = locate(histogram, coarse.rank)
    bits = ((coarse.bin - (1 << 15)) << 16) | fine.bin
    value = torch.tensor([bits ^ ((bits >> 31) & 0x7FFFFFFF)], dtype=torch.int32).view(torch.float32)
    return Order(float(value), fine.rank, fine.count)


# Ranks of several streams (say, one per expert): outer index the stream, inner index the rank.
Located = tuple[tuple[Coarse, ...], ...]
Orders = tuple[tuple[Order, ...], ...]


def rank_rounds(dtype: torch.dtype) -> int:
    """Passes over the data that ranks need: one for 16-bit floats, two for float32."""
    return 1 if dtype.itemsize == 2 else 2


def measure_ranks(
    streams: Sequence[Tensor],
    located: Located | None,
    histogram: Callable[[Tensor], Tensor] = coarse_histogram,
) -> Tensor:
    """Histograms of one chunk: coarse ones (E, 65536) first, fine ones (E, R, 65536) once located."""
    if located is None:
        return torch.stack([histogram(stream) for stream in streams])
    return torch.stack(
        [
            torch.stack([fine_histogram(stream, coarse) for coarse in ranks])
            for stream, ranks in zip(streams, located, strict=True)
        ]
    )


def measure_magnitude_ranks(streams: Sequence[Tensor], located: Located | None) -> Tensor:
    """`measure_ranks` of the absolute values of the streams."""
    if located is None:
        return measure_ranks(streams, None, magnitude_histogram)
    return measure_ranks([stream.abs() for stream in streams], located)


def conclude_ranks(
    total: Tensor,
    located: Located | None,
    dtype: torch.dtype,
    ranks: Callable[[int, int], Sequence[int]],
) -> Located | Orders:
    """Narrow ranks down: to coarse bins after the first pass, to order statistics after the last.

    `ranks(stream, count)` names the wanted ranks of a stream of `count` entries.
    """
    if located is not None:
        return tuple(
            tuple(settle_fine(coarse, fine) for coarse, fine in zip(row, histograms, strict=True))
            for row, histograms in zip(located, total, strict=True)
        )
    found = tuple(
        tuple(locate(histogram, rank) for rank in ranks(stream, int(histogram.sum())))
        for stream, histogram in enumerate(total)
    )
    if rank_rounds(dtype) == 2:
        return found
    return tuple(tuple(settle_coarse(coarse, dtype) for coarse in row) for row in found)


class Quota:
    """Marks the first `size` of the entries it is shown; chunks come in order.

    Ties at a threshold are broken by position, so that exactly the wanted number is kept.
    """

    def __init__(self, size: int) -> None:
        self.left = size

    def take(self, equal: Tensor) -> Tensor:
        """The part of the 0-1 mask `equal` that is within the quota, same shape and dtype."""
        # Exact: a chunk of ones adds up to less than 2**24.
        count = int(equal.sum(dtype=torch.float32))
        if count <= self.left:
            self.left -= count
            return equal
        taken = torch.zeros_like(equal)
        if self.left:
            first = torch.nonzero(equal.flatten())[: self.left]
            taken.view(-1)[first] = 1
            self.left = 0
        return taken


def row_ranks(magnitude: Tensor) -> Tensor:
    """Rank of each entry within its row, int64, 0 the smallest; ties by position.

    `magnitude` is (rows, width); so is the result.
    """
    order = magnitude.argsort(dim=-1, stable=True)
    positions = torch.arange(magnitude.shape[-1], device=magnitude.device).expand_as(order)
    return torch.empty_like(order).scatter_(-1, order, positions)
