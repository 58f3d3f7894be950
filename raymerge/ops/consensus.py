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


def divisor_terms(divisor: Divisor, coefficients: Sequence[float]) -> Sequence[float] | None:
    """What each expert adds to the divisor: 1, its coefficient, or None where nothing is divided."""
    if divisor == "none":
        return None
    return [1.0] * len(coefficients) if divisor == "count" else coefficients


def plain_sum(deltas: Sequence[Tensor], multipliers: Sequence[float], terms: Sequence[float] | None) -> Tensor:
    """`sum_i w_i d_i`, divided by the sum of `terms` if there are any (and it is not zero)."""
    mixed = accumulate(weighted(deltas, multipliers))
    if terms is None:
        return mixed
    total = rounded(sum(rounded(term, mixed.dtype) for term in terms), mixed.dtype)
    return mixed if abs(total) < 1e-8 else mixed / total


def agreeing_sum(deltas: Sequence[Tensor], multipliers: Sequence[float], terms: Sequence[float] | None) -> Tensor:
    """Elect the sign of `sum_i w_i d_i` per entry and add up the entries `w_i d_i` that agree with it.

    A sum of zero elects plus; zero entries never agree. The result is divided by the sum of the
    `terms` of the agreeing experts, if there are terms.
    """
    dtype = deltas[0].dtype
    entries = [entry.to(torch.float32) for entry in weighted(deltas, multipliers)]
    vote = entries[0].clone()
    for entry in entries[1:]:
        vote += entry
    # The elected sign, 1 or -1. Multiplied by it, an entry that agrees is positive: exact, and no branch.
    elected = torch.ge(vote.to(dtype), 0, out=torch.empty_like(vote)).mul_(2).sub_(1)
    total = vote.zero_()
    divisor = torch.zeros_like(total)
    for i, entry in enumerate(entries):
        agreeing = entry.mul_(elected).relu_()
        total += agreeing
        if terms is not None:
            divisor.add_(agreeing.sign_(), alpha=rounded(terms[i], dtype))
    mixed = total.mul_(elected).to(dtype)
    if terms is None:
        return mixed
    below = divisor.to(dtype)
    return mixed / (below + torch.eq(below, 0, out=torch.empty_like(below)))
