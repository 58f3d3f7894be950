"""Which entries of a task vector are kept: 0-1 float masks over chunks, in chunk order.

Thresholds come from `selection.py`; ties at a threshold are broken by position, as a stable
sort would.
"""

import torch
from torch import Tensor

from raymerge.ops.selection import Order, Quota, row_ranks


def above(magnitude: Tensor, value: float) -> Tensor:
    """1 where an entry is larger than `value`, else 0; `magnitude`'s shape and dtype."""
    return torch.gt(magnitude, value, out=torch.empty_like(magnitude))


def equal_to(magnitude: Tensor, value: float) -> Tensor:
    """1 where an entry equals `value`, else 0; `magnitude`'s shape and dtype."""
    return torch.eq(magnitude, value, out=torch.empty_like(magnitude))


class LargestKept:
    """Keeps the entries from a rank upwards; of those equal to the threshold, the first ones."""

    def __init__(self, order: Order) -> None:
        self._value = order.value
        self._ties = Quota(order.equal - order.below)

    def mask(self, magnitude: Tensor) -> Tensor:
        kept = above(magnitude, self._value)
        if self._ties.left:
            kept += self._ties.take(equal_to(magnitude, self._value))
        return kept


class BandKept:
    """Keeps the entries with low <= rank < high, ranks counted upwards and stably by position."""

    def __init__(self, low: Order, high: Order) -> None:
        self._bounds = [(bound.value, Quota(bound.below)) for bound in (low, high)]

    def mask(self, magnitude: Tensor) -> Tensor:
        from_low, from_high = (self._from(magnitude, *bound) for bound in self._bounds)
        return from_low - from_high

    @staticmethod
    def _from(magnitude: Tensor, value: float, below: Quota) -> Tensor:
        at_bound = equal_to(magnitude, value)
        return above(magnitude, value) + at_bound - below.take(at_bound)


def keep_row_band(delta: Tensor, low: int, high: int) -> Tensor:
    """0-1 mask of the entries of each row with low <= rank < high; `delta` is (rows, width)."""
    ranks = row_ranks(delta.abs())
    return ((ranks >= low) & (ranks < high)).to(delta.dtype)


def rank_probabilities(delta: Tensor, density: float, epsilon: float) -> Tensor:
    """Keep-probability rising linearly with the rank in the row, from density - epsilon to
    density + epsilon (DELLA, arXiv:2406.11617); float32 (rows, width). A row of one entry gets `density`.
    """
    width = delta.shape[-1]
    if width == 1:
        return torch.full(delta.shape, density, dtype=torch.float32, device=delta.device)
    position = row_ranks(delta.abs()).to(torch.float32) / (width - 1)
    return density - epsilon + position * (2 * epsilon)
