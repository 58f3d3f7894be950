"""Model Stock (Jang et al. 2024, arXiv:2403.19522): interpolate base and mean expert by their angles.

The paper has two experts; for more, the cosines of all pairs are averaged (as mergekit does).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from raymerge.methods.base import StatisticsMethod
from raymerge.ops.spherical import combine, gram


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelStock(StatisticsMethod):
    """`t * mean_i x_i + (1 - t) base` with `t = E c / (1 + (E - 1) c)`, c the mean cosine of task vectors."""

    num_experts: ClassVar[tuple[int, int | None]] = (2, None)

    filter_wise: bool = False
    """One angle per row (last dimension) instead of one per tensor."""

    def unit(self, shape: tuple[int, ...]) -> int:
        return max(1, shape[-1]) if self.filter_wise and shape else 1

    def rounds(self, dtype: torch.dtype) -> int:
        return 0 if self.filter_wise else 1

    def measure(self, base: Tensor | None, experts: Sequence[Tensor], known: Any, *draws: Any) -> Tensor:
        assert base is not None
        return gram([expert - base for expert in experts])

    def conclude(self, total: Tensor, known: Any, dtype: torch.dtype) -> float:
        norms = total.diagonal().sqrt()
        cosines = (total / (norms[:, None] * norms[None, :]).clamp(min=1e-6)).clamp(-1, 1)
        return float(_ratio(_pair_mean(cosines[..., None])))

    def merge(self, base: Tensor | None, experts: Sequence[Tensor], *more: Any) -> Tensor:
        assert base is not None
        count = len(experts)
        if not self.filter_wise:
            t = more[0]
            return combine([base, *experts], [1 - t] + [t / count] * count)
        origin = base.to(torch.float32)
        deltas = torch.stack([expert.to(torch.float32) - origin for expert in experts])
        norms = deltas.norm(dim=-1)
        products = torch.einsum("i...d,j...d->ij...", deltas, deltas)
        cosines = (products / (norms[:, None] * norms[None, :]).clamp(min=1e-6)).clamp(-1, 1)
        return (origin + _ratio(_pair_mean(cosines))[..., None] * deltas.mean(0)).to(base.dtype)


def _pair_mean(cosines: Tensor) -> tuple[Tensor, int]:
    """Mean over the pairs i < j of (E, E, ...), and E."""
    count = cosines.shape[0]
    rows, columns = torch.triu_indices(count, count, offset=1)
    return cosines[rows, columns].mean(0), count


def _ratio(mean: tuple[Tensor, int]) -> Tensor:
    """`E c / (1 + (E - 1) c)`, 0 where it is singular."""
    cosine, count = mean
    below = 1 + (count - 1) * cosine
    singular = below.abs() < 1e-6
    return torch.where(singular, 0, count * cosine / torch.where(singular, 1, below))
