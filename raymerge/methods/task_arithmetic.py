"""Task arithmetic (Ilharco et al. 2023, arXiv:2212.04089): base plus a weighted sum of task vectors."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from raymerge.methods.base import PerExpert, TensorMethod, per_expert
from raymerge.ops.consensus import Divisor, divisor_terms, plain_sum


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskArithmetic(TensorMethod):
    """`base + scale * sum_i c_i (x_i - base)`."""

    elementwise: ClassVar[bool] = True

    coefficient: PerExpert = per_expert(default=0.3)
    """Multiplier of each expert's task vector."""

    scale: float = 1.0
    """Multiplier of the merged task vector."""

    divisor: Divisor = "none"
    """Divide the sum by nothing, by the number of experts (`count`) or by the sum of coefficients."""

    def merge(self, base: Tensor | None, experts: Sequence[Tensor], *more: Any) -> Tensor:
        assert base is not None
        deltas = [expert - base for expert in experts]
        mixed = plain_sum(deltas, self.coefficient, divisor_terms(self.divisor, self.coefficient))
        return base + mixed * self.scale
