"""Multi-SLERP (mergekit, Goddard 2024): barycentric interpolation of any number of experts on a sphere.

One step of the exponential map from the weighted mean direction: its tangent sum is zero identically,
so the result is the normalised weighted sum of unit tensors times the weighted sum of their norms.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from raymerge.methods.base import PerExpert, StatisticsMethod, per_expert, require
from raymerge.ops.spherical import combine, gram, normalized_mean_coefficients


@dataclass(frozen=True, kw_only=True, slots=True)
class Multislerp(StatisticsMethod):
    """`normalise(sum_i s_i x_i/|x_i|) * sum_i s_i |x_i|`, on task vectors if there is a base."""

    needs_base: ClassVar[bool] = False

    coefficient: PerExpert = per_expert(default=1.0)
    """How much of each expert."""

    normalize: bool = True
    """Divide the coefficients by their sum."""

    eps: float = 1e-8
    """Added to norms; a mean direction shorter than this has cancelled."""

    def check(self) -> None:
        require(
            not self.normalize or abs(sum(self.coefficient)) > 1e-12,
            "the coefficients add up to 0; give others, or set normalize: false",
        )

    def measure(self, base: Tensor | None, experts: Sequence[Tensor], known: Any, *draws: Any) -> Tensor:
        return gram(experts if base is None else [expert - base for expert in experts])

    def conclude(self, total: Tensor, known: Any, dtype: torch.dtype) -> list[float]:
        whole = sum(self.coefficient) if self.normalize else 1.0
        if len(self.coefficient) == 1:
            return [1.0]
        return normalized_mean_coefficients(total, [c / whole for c in self.coefficient], self.eps)

    def merge(self, base: Tensor | None, experts: Sequence[Tensor], *more: Any) -> Tensor:
        if base is None:
            return combine(experts, more[0])
        return base + combine([expert - base for expert in experts], more[0])
