"""Model Breadcrumbs (Davari and Belilovsky 2024, arXiv:2312.06795).

Drop the largest entries of each task vector (outliers) and the smallest, keep the band between.
The published code ranks the entries of each row, mergekit those of the tensor. Of n entries,
`int(density * n)` are kept below the `int(gamma * n)` largest; where fewer than that are left,
fewer outliers are dropped. `breadcrumbs_ties` elects signs before adding up.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from raymerge.methods.base import PerExpert, per_expert, require
from raymerge.methods.sparse import SparseTaskVectors
from raymerge.ops.consensus import Divisor
from raymerge.ops.randomness import Draws
from raymerge.ops.selection import Orders, conclude_ranks, measure_magnitude_ranks, rank_rounds
from raymerge.ops.sparsify import BandKept, keep_row_band


@dataclass(frozen=True, kw_only=True, slots=True)
class Breadcrumbs(SparseTaskVectors):
    """`base + scale * sum_i c_i (the middle band of x_i - base)`."""

    coefficient: PerExpert = per_expert(default=0.2)
    """Multiplier of each expert's task vector (alpha in the paper)."""

    density: PerExpert = per_expert(default=0.15)
    """Fraction of entries kept, in (0, 1] (beta in the paper); 1 keeps the task vector as it is."""

    gamma: PerExpert = per_expert(default=0.006)
    """Fraction of the largest entries that is dropped, in [0, 1)."""

    trim_scope: Literal["row", "tensor"] = "row"
    """Rank entries within each `row` (the published code) or over the `tensor` (mergekit)."""

    def check(self) -> None:
        SparseTaskVectors.check(self)
        require(all(0 <= g < 1 for g in self.gamma), f"gamma {list(self.gamma)} must be in [0, 1)")

    def unit(self, shape: tuple[int, ...]) -> int:
        return max(1, shape[-1]) if self.trim_scope == "row" and shape else 1

    def band(self, expert: int, count: int) -> tuple[int, int]:
        """The ranks [low, high) kept of `count` entries."""
        target = int(min(1.0, self.density[expert]) * count)
        low = max(0, count - target - int(self.gamma[expert] * count))
        return low, low + target

    def ranking_rounds(self, dtype: torch.dtype) -> int:
        return rank_rounds(dtype) if self.trim_scope == "tensor" else 0

    def measure_rule(self, deltas: Sequence[Tensor], rule: Any) -> Tensor:
        return measure_magnitude_ranks(deltas, rule)

    def conclude_rule(self, total: Tensor, rule: Any, dtype: torch.dtype) -> Any:
        return conclude_ranks(total, rule, dtype, self.band)

    def start_rule(self, rule: Orders) -> list[BandKept]:
        return [BandKept(low, high) for low, high in rule]

    def keep(self, expert: int, delta: Tensor, rule: Any, draws: Draws | None) -> Tensor:
        if rule is not None:
            kept: BandKept = rule[expert]
            return kept.keep(delta)
        return keep_row_band(delta, *self.band(expert, delta.shape[-1] if delta.dim() else 1))


@dataclass(frozen=True, kw_only=True, slots=True)
class BreadcrumbsTies(Breadcrumbs):
    """Breadcrumbs, then the sign consensus of TIES."""

    consensus: ClassVar[bool] = True

    coefficient: PerExpert = per_expert(default=1.0)
    """Multiplier of each expert's task vector; it weighs the vote too."""

    divisor: Divisor = "count"
    """Divide by the number of agreeing experts, by their coefficients, or by nothing (mergekit)."""
