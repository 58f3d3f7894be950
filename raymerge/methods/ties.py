"""TIES-Merging (Yadav et al. 2023, arXiv:2306.01708).

Keep the largest entries of each task vector, elect one sign per entry, average the entries that
agree with it. The paper ranks entries over the whole model, mergekit per tensor. Of n entries
`max(1, int(density * n))` are kept; over the whole model, all entries equal to the threshold are.
A vote of exactly zero elects plus.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from raymerge.methods.base import PerExpert, Scope, per_expert
from raymerge.methods.sparse import SparseTaskVectors
from raymerge.ops.consensus import Divisor
from raymerge.ops.randomness import Draws
from raymerge.ops.selection import Orders, conclude_ranks, measure_magnitude_ranks, rank_rounds
from raymerge.ops.sparsify import LargestKept


@dataclass(frozen=True, kw_only=True, slots=True)
class Ties(SparseTaskVectors):
    """`base + scale * (mean of the trimmed task vectors that agree with the elected sign)`."""

    consensus: ClassVar[bool] = True
    scoped_settings: ClassVar[tuple[str, ...]] = ("density", "trim_scope", "rescale")

    density: PerExpert = per_expert(default=0.2)
    """Fraction of entries kept in each task vector, in (0, 1]; 1 keeps the task vector as it is."""

    trim_scope: Scope = "model"
    """Rank the entries over the whole `model` (the paper) or per `tensor` (mergekit)."""

    divisor: Divisor = "count"
    """Divide by the number of agreeing experts (the paper), by their coefficients (mergekit), or not."""

    @property
    def scope(self) -> Scope:
        return self.trim_scope

    def ranking_rounds(self, dtype: torch.dtype) -> int:
        return rank_rounds(dtype)

    def measure_rule(self, deltas: Sequence[Tensor], rule: Any) -> Tensor:
        return measure_magnitude_ranks(deltas, rule)

    def conclude_rule(self, total: Tensor, rule: Any, dtype: torch.dtype) -> Any:
        def ranks(expert: int, count: int) -> list[int]:
            return [count - max(1, int(min(1.0, self.density[expert]) * count))]

        return conclude_ranks(total, rule, dtype, ranks)

    def start_rule(self, rule: Orders) -> list[LargestKept]:
        if self.trim_scope == "model":
            return [LargestKept(replace(order, below=0)) for (order,) in rule]
        return [LargestKept(order) for (order,) in rule]

    def keep(self, expert: int, delta: Tensor, rule: Any, draws: Draws | None) -> Tensor:
        kept: LargestKept = rule[expert]
        return kept.keep(delta)
