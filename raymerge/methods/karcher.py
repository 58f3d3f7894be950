"""Karcher mean (arXiv:2603.04972): the point on the sphere with the least squared angle to all experts."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from raymerge.methods.base import StatisticsMethod
from raymerge.ops.spherical import combine, gram, karcher_coefficients


@dataclass(frozen=True, kw_only=True, slots=True)
class Karcher(StatisticsMethod):
    """Riemannian mean of the unit tensors, times the mean of their norms. A base lends its config only."""

    needs_base: ClassVar[bool] = False
    uses_base: ClassVar[bool] = False

    max_iter: int = 10
    """Largest number of fixed-point steps."""

    tol: float = 1e-5
    """A step shorter than this (radians) ends the iteration; tensors shorter than this have no direction."""

    def measure(self, base: Tensor | None, experts: Sequence[Tensor], known: Any, *draws: Any) -> Tensor:
        return gram(experts)

    def conclude(self, total: Tensor, known: Any, dtype: torch.dtype) -> list[float]:
        return [1.0] if len(total) == 1 else karcher_coefficients(total, self.max_iter, self.tol)

    def merge(self, base: Tensor | None, experts: Sequence[Tensor], *more: Any) -> Tensor:
        return combine(experts, more[0])
