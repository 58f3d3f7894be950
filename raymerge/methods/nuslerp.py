"""NuSLERP (mergekit): spherical interpolation of two experts, or of their task vectors if there is a base."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from raymerge.methods.base import PerExpert, StatisticsMethod, per_expert
from raymerge.ops.spherical import combine, gram, slerp_coefficients, slerp_rows


@dataclass(frozen=True, kw_only=True, slots=True)
class Nuslerp(StatisticsMethod):
    """`slerp(x_1, x_2; t)` with `t = c_2 / (c_1 + c_2)`, one half if the coefficients cancel."""

    needs_base: ClassVar[bool] = False
    num_experts: ClassVar[tuple[int, int | None]] = (2, 2)

    coefficient: PerExpert = per_expert(default=1.0)
    """How much of each expert; only the ratio counts."""

    over: Literal["tensor", "row", "column"] = "tensor"
    """Interpolate the flattened tensor, each row (last dimension), or each column (first dimension)."""

    @property
    def t(self) -> float:
        total = sum(self.coefficient)
        return 0.5 if abs(total) < 1e-6 else self.coefficient[1] / total

    def unit(self, shape: tuple[int, ...]) -> int:
        if self.over == "tensor":
            return 1
        return max(1, shape[-1]) if self.over == "row" and shape else max(1, prod(shape))

    def rounds(self, dtype: torch.dtype) -> int:
        return int(self.over == "tensor")

    def measure(self, base: Tensor | None, experts: Sequence[Tensor], known: Any, *draws: Any) -> Tensor:
        return gram(self._ends(base, experts))

    def conclude(self, total: Tensor, known: Any, dtype: torch.dtype) -> tuple[float, float]:
        return slerp_coefficients(total, self.t, parallel=1.0)

    def merge(self, base: Tensor | None, experts: Sequence[Tensor], *more: Any) -> Tensor:
        ends = self._ends(base, experts)
        if self.over == "tensor":
            mixed = combine(ends, more[0])
        elif self.over == "row" or ends[0].dim() == 0:
            mixed = slerp_rows(ends[0], ends[1], self.t).to(ends[0].dtype)
        else:
            left, right = (end.transpose(0, -1) for end in ends)
            mixed = slerp_rows(left, right, self.t).transpose(0, -1).to(left.dtype)
        return mixed if base is None else base + mixed

    @staticmethod
    def _ends(base: Tensor | None, experts: Sequence[Tensor]) -> list[Tensor]:
        return list(experts) if base is None else [expert - base for expert in experts]
