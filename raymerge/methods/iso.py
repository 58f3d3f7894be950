"""Isotropic merging (Marczak et al. 2025, "No Task Left Behind", arXiv:2502.04959).

Task vectors of matrices are merged so that all directions of the result are equally strong: `iso_c`
flattens the singular values of their sum, `iso_cts` reserves some directions for each task. Other
tensors are averaged. Every 2-D tensor counts as a matrix, embeddings too; use a filter on
`coefficient` or another method for those if that is not wanted.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from raymerge.methods.base import TensorMethod, require
from raymerge.ops.subspace import is_matrix, isotropic, isotropic_common_and_specific


@dataclass(frozen=True, kw_only=True, slots=True)
class IsoC(TensorMethod):
    """`base + scale * U mean(S) V^T` of the sum of task vectors; the mean task vector for other tensors."""

    scale: float = 1.0
    """Multiplier of the merged task vector (alpha in the paper, tuned in (0, 3])."""

    def scratch_copies(self, num_experts: int) -> int:
        return num_experts + 4

    def merge(self, base: Tensor | None, experts: Sequence[Tensor], *more: Any) -> Tensor:
        assert base is not None
        origin = base.to(torch.float32)
        deltas = [expert.to(torch.float32) - origin for expert in experts]
        mixed = self.mix(deltas) if is_matrix(base) else sum(deltas[1:], deltas[0]) / len(deltas)
        return (origin + self.scale * mixed).to(base.dtype)

    def mix(self, deltas: Sequence[Tensor]) -> Tensor:
        """Merge task matrices (O, I)."""
        return isotropic(sum(deltas[1:], deltas[0]))


@dataclass(frozen=True, kw_only=True, slots=True)
class IsoCts(IsoC):
    """Iso-C with a share of the directions taken from each task alone."""

    common_fraction: float = 0.8
    """Share of the directions taken from the sum of the task vectors, in (0, 1]."""

    def scratch_copies(self, num_experts: int) -> int:
        return num_experts + 8

    def check(self) -> None:
        require(0 < self.common_fraction <= 1, f"common_fraction {self.common_fraction} must be in (0, 1]")

    def mix(self, deltas: Sequence[Tensor]) -> Tensor:
        return isotropic_common_and_specific(deltas, self.common_fraction)
