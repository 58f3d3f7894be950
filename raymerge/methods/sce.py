"""SCE (Wan et al. 2024, FuseChat, arXiv:2408.07990): select by variance, weigh by energy, erase minorities.

Entries whose variance over the experts is among the `select_topk` largest are kept (of those that
vary at all), each task vector is weighed by its mean square, and entries that disagree with the elected
sign are erased.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from raymerge.methods.base import StatisticsMethod, require
from raymerge.methods.sparse import Found
from raymerge.ops.consensus import accumulate, rounded
from raymerge.ops.selection import BINS, conclude_ranks, measure_magnitude_ranks, rank_rounds
from raymerge.ops.sparsify import LargestKept


@dataclass(frozen=True, kw_only=True, slots=True)
class Sce(StatisticsMethod):
    """`base + sum_i q_i m_i d_i / max(sum_i q_i m_i, 1e-6)`."""

    select_topk: float = 1.0
    """Fraction of the varying entries that is kept, in [0, 1]; 1 keeps all."""

    def check(self) -> None:
        require(0 <= self.select_topk <= 1, f"select_topk {self.select_topk} must be in [0, 1]")

    def ranking_rounds(self, dtype: torch.dtype) -> int:
        return rank_rounds(dtype) if self.select_topk < 1 else 0

    def rounds(self, dtype: torch.dtype) -> int:
        return self.ranking_rounds(dtype) + 1

    def measure(self, base: Tensor | None, experts: Sequence[Tensor], known: Any, *draws: Any) -> Tensor:
        assert base is not None
        found = known or Found()
        deltas = [expert - base for expert in experts]
        if found.round < self.ranking_rounds(base.dtype):
            return measure_magnitude_ranks([_variance(deltas)], found.rule)
        squares = [delta.to(torch.float32).square().sum() for delta in _select(deltas, found.rule)]
        return torch.stack([*squares, torch.tensor(float(base.numel()))]).to(torch.float64)

    def conclude(self, total: Tensor, known: Any, dtype: torch.dtype) -> Found:
        found = known or Found()
        if found.round < self.ranking_rounds(dtype):

            def ranks(stream: int, count: int) -> list[int]:
                varying = count - int(total[0, BINS // 2])
                return [count - int(varying * self.select_topk)]

            rule = conclude_ranks(total, found.rule, dtype, ranks)
            ranked = found.round + 1 == self.ranking_rounds(dtype)
            return Found(found.round + 1, rule, ranked=ranked)
        return replace(found, round=found.round + 1, norms=total[:-1] / total[-1])

    def start(self, known: Any) -> Found:
        found = known or Found()
        return replace(found, rule=LargestKept(found.rule[0][0])) if found.ranked else found

    def merge(self, base: Tensor | None, experts: Sequence[Tensor], *more: Any) -> Tensor:
        assert base is not None
        (found,) = more
        energy = found.norms.tolist()
        whole = sum(energy)
        shares = [1 / len(energy) if whole < 1e-6 else e / whole for e in energy]
        kept = _select([expert - base for expert in experts], found.rule)
        positive = torch.ge(accumulate(kept), 0, out=torch.empty_like(base))
        top = torch.zeros_like(base, dtype=torch.float32)
        below = torch.zeros_like(top)
        for delta, share in zip(kept, shares, strict=True):
            # 1 where the sign agrees with the elected one; zero entries never agree.
            agrees = positive * delta.sign().clamp(min=0) - (1 - positive) * delta.sign().clamp(max=0)
            erased = agrees * rounded(share, base.dtype)
            top += delta * erased
            below += erased
        return base + top.to(base.dtype) / below.to(base.dtype).clamp(min=1e-6)


def _variance(deltas: Sequence[Tensor]) -> Tensor:
    """Biased variance over the experts, per entry."""
    return torch.stack(list(deltas)).var(dim=0, unbiased=False)


def _select(deltas: Sequence[Tensor], kept: LargestKept | None) -> list[Tensor]:
    if kept is None:
        return list(deltas)
    mask = kept.keep(_variance(deltas)).sign_()
    return [delta * mask for delta in deltas]
