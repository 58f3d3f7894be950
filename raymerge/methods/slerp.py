"""Spherical linear interpolation from the base to one expert (Shoemake 1985), over the flattened tensor."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from raymerge.methods.base import StatisticsMethod
from raymerge.ops.spherical import combine, gram, slerp_coefficients

PARALLEL = 0.9995


@dataclass(frozen=True, kw_only=True, slots=True)
class Slerp(StatisticsMethod):
    """`[sin((1-t) a) base + sin(t a) expert] / sin a`, a the angle between them; linear if nearly parallel."""

    num_experts: ClassVar[tuple[int, int | None]] = (1, 1)

    t: float = 0.5
    """Position between the base (0) and the expert (1)."""

    def measure(self, base: Tensor | None, experts: Sequence[Tensor], known: Any, *draws: Any) -> Tensor:
        assert base is not None
        return gram([base, *experts])

    def conclude(self, total: Tensor, known: Any, dtype: torch.dtype) -> tuple[float, float]:
        return slerp_coefficients(total, self.t, PARALLEL)

    def merge(self, base: Tensor | None, experts: Sequence[Tensor], *more: Any) -> Tensor:
        assert base is not None
        return combine([base, *experts], more[0])
