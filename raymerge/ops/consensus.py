"""Add task vectors up, plainly or by sign consensus (TIES-Merging, arXiv:2306.01708).

Masks are floats, 0 or 1: on CPUs torch compares and multiplies floats several times faster than
it selects by booleans. Sums over experts are accumulated in float32 and rounded once, whatever
the dtype of the task vectors.

Shapes: all tensors of one call have the same shape; E experts.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

Divisor = Literal["none", "count", "coefficient"]


def accumulate(tensors: Sequence[Tensor]) -> Tensor:
    """Sum in float32, rounded once to the tensors' dtype."""
    total = tensors[0].to(torch.float32, copy=True)
    for tensor in tensors[1:]:
        total += tensor
    return total.to(tensors[0].dtype)


def weighted(tensors: Sequence[Tensor], coefficients: Sequence[float]) -> list[Tensor]:
    """Multiply each tensor by its coefficient, rounded to the tensor's dtype first."""
    return [tensor * rounded(c, tensor.dtype) for tensor, c in zip(tensors, coefficients, strict=True)]


def rounded(value: float, dtype: torch.dtype) -> float:
    """`value` as the nearest number of `dtype`."""
    return float(torch.tensor(value, dtype=dtype))


def plain_sum(deltas: Sequence[Tensor], coefficients: Sequence[float], divisor: Divisor) -> Tensor:
    """`sum_i c_i d_i`, divided by the number of experts or by the sum of the coefficients."""
    mixed = accumulate(weighted(deltas, coefficients))
    if divisor == "none":
        return mixed
    dtype = mixed.dtype
    terms = [1.0 if divisor == "count" else rounded(c, dtype) for c in coefficients]
    total = rounded(sum(terms), dtype)
    return mixed if abs(total) < 1e-8 else mixed / total


def agreeing_sum(deltas: Sequence[Tensor], coefficients: Sequence[float], divisor: Divisor) -> Tensor:
    """Elect the sign of `sum_i c_i d_i` per entry and add up the entries that agree with it.

    A sum of zero elects plus; zero entries never agree. `divisor` divides by the number of
    agreeing entries (`count`), by the sum of their coefficients (`coefficient`), or not at all.
    """
    entries = weighted(deltas, coefficients)
    vote = accumulate(entries)
    positive = torch.ge(vote, 0, out=torch.empty_like(vote))
    dtype = vote.dtype
    up = torch.zeros_like(vote, dtype=torch.float32)
    down = torch.zeros_like(up)
    for entry in entries:
        up += entry.clamp(min=0)
        down += entry.clamp(max=0)
    # positive is 0 or 1, so this selects exactly.
    mixed = (positive * up + (1 - positive) * down).to(dtype)
    if divisor == "none":
        return mixed
    up.zero_()
    down.zero_()
    for entry, coefficient in zip(entries, coefficients, strict=True):
        term = 1.0 if divisor == "count" else rounded(coefficient, dtype)
        sign = entry.sign()
        up.add_(sign.clamp(min=0), alpha=term)
        down.add_(sign.clamp(max=0), alpha=-term)
    total = (positive * up + (1 - positive) * down).to(dtype)
    return mixed / (total + torch.eq(total, 0, out=torch.empty_like(total)))
