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

    def keep(self, values: Tensor) -> Tensor:
        """`values` with the entries that are not kept set to zero."""
        kept = torch.nn.functional.hardshrink(values, self._value)
        if self._ties.left:
            kept += values * self._ties.take(equal_to(values.abs(), self._value))
        return kept


class BandKept:
    """Keeps the entries with low <= rank < high, ranks counted upwards and stably by position."""

    def __init__(self, low: Order, high: Order) -> None:
        self._bounds = [(bound.value, Quota(bound.below)) for bound in (low, high)]

    def keep(self, values: Tensor) -> Tensor:
        """`values` with the entries that are not kept set to zero."""
        magnitude = values.abs()
        from_low, from_high = (self._from(magnitude, *bound) for bound in self._bounds)
        return values * (from_low - from_high)

    @staticmethod
    def _from(magnitude: Tensor, value: float, below: Quota) -> Tensor:
        """1 where an entry has the bound's rank or a higher one."""
        at_bound = equal_to(magnitude, value)
        return above(magnitude, value) + at_bound - below.take(at_bound)


def keep_row_band(values: Tensor, low: int, high: int) -> Tensor:
    """(rows, width) with the entries zeroed whose rank in their row is not in [low, high)."""
    ranks = row_ranks(values.abs())
    return values * ((ranks >= low) & (ranks < high))


def rank_probabilities(delta: Tensor, density: float, epsilon: float) -> Tensor:
    """Keep-probability rising linearly with the rank in the row, from density - epsilon to
    density + epsilon (DELLA, arXiv:2406.11617); float32 (rows, width). A row of one entry gets `density`.
    """
    width = delta.shape[-1]
    if width == 1:
        return torch.full(delta.shape, density, dtype=torch.float32, device=delta.device)
    position = row_ranks(delta.abs()).to(torch.float32) / (width - 1)
    return density - epsilon + position * (2 * epsilon)
