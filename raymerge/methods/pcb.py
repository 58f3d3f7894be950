"""PCB-Merging (Du et al. 2024, "Parameter Competition Balancing", arXiv:2410.02396).

Entries compete within their task vector (by magnitude) and with the other tasks (by agreement with
their sum); the winners' scores weigh the task vectors. All ranks are over the whole model, exact,
found in bounded memory. This follows the published root script: magnitudes clamped at 1e-4 from
both ends, `tanh(d_i * sum_j d_j)` for the competition between tasks.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from raymerge.methods.base import Scope, StatisticsMethod, require
from raymerge.ops.selection import Orders, conclude_ranks, measure_magnitude_ranks, measure_ranks, rank_rounds

CLAMPED = 1e-4


@dataclass(frozen=True, slots=True)
class Ranked:
    """What the rounds so far found; `where` is narrowed down until it settles into one of the two."""

    where: Any = None
    magnitudes: Orders | None = None
    """Per expert, the order statistics that clamp its magnitudes from below and above."""
    scores: Orders | None = None
    """Per expert, the score below which entries lose, and the highest score."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Pcb(StatisticsMethod):
    """`base + coefficient * sum_i s_i clamp(d_i) / sum_i s_i`, s_i the scores scaled to [0, 1]."""

    scoped_settings: ClassVar[tuple[str, ...]] = ("ratio",)

    coefficient: float = 1.2
    """Multiplier of the merged task vector (lambda in the paper)."""

    ratio: float = 0.1
    """Fraction of the entries of each task vector that win, in (0, 1]."""

    @property
    def scope(self) -> Scope:
        return "model"

    def check(self) -> None:
        require(0 < self.ratio <= 1, f"ratio {self.ratio} must be in (0, 1]")

    def rounds(self, dtype: torch.dtype) -> int:
        # Scores are always float32.
        return rank_rounds(dtype) + rank_rounds(torch.float32)

    def measure(self, base: Tensor | None, experts: Sequence[Tensor], known: Any, *draws: Any) -> Tensor:
        assert base is not None
        found = known or Ranked()
        deltas = [expert - base for expert in experts]
        if found.magnitudes is None:
            return measure_magnitude_ranks(deltas, found.where)
        return measure_ranks(_scores(deltas, found.magnitudes), found.where)

    def conclude(self, total: Tensor, known: Any, dtype: torch.dtype) -> Ranked:
        found = known or Ranked()

        def clamped(_: int, count: int) -> list[int]:
            return [int(count * CLAMPED), int(count * (1 - CLAMPED) - 1)]

        def winning(_: int, count: int) -> list[int]:
            return [int(count * (1 - self.ratio)), count - 1]

        ranking_magnitudes = found.magnitudes is None
        precision = dtype if ranking_magnitudes else torch.float32
        where = conclude_ranks(total, found.where, precision, clamped if ranking_magnitudes else winning)
        if found.where is None and rank_rounds(precision) == 2:
            return Ranked(where, found.magnitudes)
        return Ranked(None, where) if ranking_magnitudes else Ranked(None, found.magnitudes, where)  # type: ignore[arg-type]

    def merge(self, base: Tensor | None, experts: Sequence[Tensor], *more: Any) -> Tensor:
        assert base is not None
        found: Ranked = more[0]
        assert found.magnitudes is not None and found.scores is not None
        deltas = [expert - base for expert in experts]
        top = torch.zeros_like(base, dtype=torch.float32)
        below = torch.zeros_like(top)
        scores = _scores(deltas, found.magnitudes)
        for delta, score, (low, high), (lose, best) in zip(deltas, scores, found.magnitudes, found.scores, strict=True):
            share = (score.clamp(lose.value, best.value) - lose.value) / max(best.value - lose.value, 1e-30)
            top += share * delta.sign() * delta.abs().clamp(low.value, high.value)
            below += share
        return (base + self.coefficient * top / below.clamp(min=1e-12)).to(base.dtype)


def _scores(deltas: Sequence[Tensor], magnitudes: Orders) -> list[Tensor]:
    """`exp(E * m_i^2) * tanh(d_i * sum_j d_j)`, m_i the clamped magnitude scaled to [0, 1]; float32."""
    floats = [delta.to(torch.float32) for delta in deltas]
    total = sum(floats[1:], floats[0])
    return [
        torch.exp(
            len(floats)
            * ((delta.abs().clamp(low.value, high.value) - low.value) / max(high.value - low.value, 1e-30)).square()
        )
        * torch.tanh(delta * total)
        for delta, (low, high) in zip(floats, magnitudes, strict=True)
    ]
