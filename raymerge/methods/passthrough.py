"""Pass one expert's tensors through, scaled if wanted: the method of layer stacking (mergekit slices)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from raymerge.methods.base import PerExpert, TensorMethod, per_expert


@dataclass(frozen=True, kw_only=True, slots=True)
class Passthrough(TensorMethod):
    """`scale * x`, of exactly one expert per tensor."""

    needs_base: ClassVar[bool] = False
    uses_base: ClassVar[bool] = False
    elementwise: ClassVar[bool] = True
    num_experts: ClassVar[tuple[int, int | None]] = (1, 1)

    scale: PerExpert = per_expert(default=1.0)
    """Multiplier of the expert's weights."""

    def merge(self, base: Tensor | None, experts: Sequence[Tensor], *more: Any) -> Tensor:
        return experts[0] if self.scale[0] == 1 else experts[0] * self.scale[0]
