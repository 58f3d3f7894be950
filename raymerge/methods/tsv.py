"""Task Singular Vectors, TSV-Merge (Gargiulo et al. 2025, arXiv:2412.00081).

Each task matrix is cut to rank r / E, the singular vectors of all tasks are made orthogonal to each
other, and the low-rank matrices are added up. Other tensors get the mean task vector.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from raymerge.methods.base import TensorMethod
from raymerge.ops.subspace import decorrelated_sum, is_matrix


@dataclass(frozen=True, kw_only=True, slots=True)
class Tsv(TensorMethod):
    """`base + scale * sum_i` of decorrelated rank-r/E task matrices."""

    scale: float = 1.0
    """Multiplier of the merged task vector (alpha in the paper)."""

    def scratch_copies(self, num_experts: int) -> int:
        return 4 * num_experts + 6

    def merge(self, base: Tensor | None, experts: Sequence[Tensor], *more: Any) -> Tensor:
        assert base is not None
        origin = base.to(torch.float32)
        deltas = [expert.to(torch.float32) - origin for expert in experts]
        mixed = decorrelated_sum(deltas) if is_matrix(base) else sum(deltas[1:], deltas[0]) / len(deltas)
        return (origin + self.scale * mixed).to(base.dtype)
