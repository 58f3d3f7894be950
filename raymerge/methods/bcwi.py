"""Backward-compatible weight interpolation (Schumann et al. 2024, arXiv:2301.10546).

Between an old model (the base) and a new one (the expert): part of the gain, few of the answers
that were right before and would now be wrong.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from raymerge.methods.base import PerExpert, TensorMethod, per_expert, require


@dataclass(frozen=True, kw_only=True, slots=True)
class Bcwi(TensorMethod):
    """`(1 - c) * old + c * new`."""

    elementwise: ClassVar[bool] = True
    num_experts: ClassVar[tuple[int, int | None]] = (1, 1)

    coefficient: PerExpert = per_expert(default=0.5)
    """Share of the new model, in [0, 1]."""

    def check(self) -> None:
        require(0 <= self.coefficient[0] <= 1, f"coefficient {self.coefficient[0]} must be in [0, 1]")

    def merge(self, base: Tensor | None, experts: Sequence[Tensor], *more: Any) -> Tensor:
        assert base is not None
        return base + (experts[0] - base) * self.coefficient[0]
