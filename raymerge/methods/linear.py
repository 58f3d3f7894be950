"""Weighted average of checkpoints (model soups, Wortsman et al. 2022, arXiv:2203.05482)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from raymerge.methods.base import PerExpert, TensorMethod, per_expert, require


@dataclass(frozen=True, kw_only=True, slots=True)
class Linear(TensorMethod):
    """`sum_i c_i x_i / sum_i c_i`; float32 arithmetic whatever the recipe's. A base lends its config only."""

    needs_base: ClassVar[bool] = False
    uses_base: ClassVar[bool] = False
    elementwise: ClassVar[bool] = True

    coefficient: PerExpert = per_expert(default=1.0)
    """Multiplier of each expert's weights."""

    normalize: bool = True
    """Divide by the sum of the coefficients."""

    def check(self) -> None:
        require(
            not self.normalize or abs(sum(self.coefficient)) > 1e-12,
            "linear: the coefficients add up to 0; give others, or set normalize: false",
        )

    def merge(self, base: Tensor | None, experts: Sequence[Tensor], *more: Any) -> Tensor:
        total = experts[0].to(torch.float32, copy=True).mul_(self.coefficient[0])
        for expert, coefficient in zip(experts[1:], self.coefficient[1:], strict=True):
            total.add_(expert.to(torch.float32), alpha=coefficient)
        if self.normalize:
            total /= sum(self.coefficient)
        return total.to(experts[0].dtype)
