"""What TIES, DARE, Breadcrumbs and DELLA share: sparsify task vectors, rescale them, add them up.

    delta_i = x_i - base;  kept_i = r_i * mask_i * delta_i;  base + scale * mix(c_i * kept_i)

A method says how a mask is ruled (by ranks found in a first pass, by ranks in the row, by chance)
and whether `mix` elects signs. Rescaling to the L1 norm, as mergekit does, costs one more pass.
"""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from raymerge.methods.base import PerExpert, StatisticsMethod, per_expert, require
from raymerge.ops.consensus import Divisor, agreeing_sum, divisor_terms, plain_sum
from raymerge.ops.randomness import Draws

Rescale = Literal["none", "l1", "inverse_density"]


@dataclass(frozen=True, slots=True)
class Found:
    """What the rounds so far found: the rule by which entries are kept, then L1 norms (E, 2)."""

    round: int = 0
    rule: Any = None
    norms: Tensor | None = None
    ranked: bool = False
    """The rule is final; before that it says where the ranks lie so far."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SparseTaskVectors(StatisticsMethod):
    """Base class of the methods that merge sparsified task vectors."""

    consensus: ClassVar[bool] = False
    """Elect a sign per entry and add up only what agrees with it."""

    coefficient: PerExpert = per_expert(default=1.0)
    """Multiplier of each expert's task vector; where signs are elected, it weighs the vote too."""

    density: PerExpert = per_expert(default=0.5)
    """Fraction of entries kept in each task vector, in (0, 1]; 1 keeps the task vector as it is."""

    rescale: Rescale = "none"
    """Leave kept entries, scale them to keep the L1 norm (mergekit), or divide them by density (DARE)."""

    scale: float = 1.0
    """Multiplier of the merged task vector."""

    divisor: Divisor = "none"
    """Divide by nothing, by the number of (agreeing) experts, or by the sum of their coefficients."""

    def check(self) -> None:
        require(all(0 < d <= 1 for d in self.density), f"density {list(self.density)} must be in (0, 1]")

    def ranking_rounds(self, dtype: torch.dtype) -> int:
        """Passes that finding the rule needs."""
        return 0

    def measure_rule(self, deltas: Sequence[Tensor], rule: Any) -> Tensor:
        """Statistics of one chunk for the rule; only called if `ranking_rounds` is positive."""
        raise NotImplementedError

    def conclude_rule(self, total: Tensor, rule: Any, dtype: torch.dtype) -> Any:
        raise NotImplementedError

    def start_rule(self, rule: Any) -> Any:
        """State of the final rule for one pass over one tensor, living from chunk to chunk."""
        return rule

    @abstractmethod
    def keep(self, expert: int, delta: Tensor, rule: Any, draws: Draws | None) -> Tensor:
        """A chunk of an expert's task vector with the entries that are not kept set to zero."""

    def rounds(self, dtype: torch.dtype) -> int:
        if min(self.density) >= 1:
            return 0
        return self.ranking_rounds(dtype) + (self.rescale == "l1")

    def measure(self, base: Tensor | None, experts: Sequence[Tensor], known: Any, *draws: Any) -> Tensor:
        assert base is not None
        found = known or Found()
        deltas = [expert - base for expert in experts]
        if found.round < self.ranking_rounds(base.dtype):
            return self.measure_rule(deltas, found.rule)
        kept = self.sparsify(deltas, found.rule, draws)
        pairs = zip(deltas, kept, strict=True)
        norms = [[part.abs().sum(dtype=torch.float32) for part in pair] for pair in pairs]
        return torch.tensor(norms, dtype=torch.float64)

    def conclude(self, total: Tensor, known: Any, dtype: torch.dtype) -> Found:
        found = known or Found()
        if found.round < self.ranking_rounds(dtype):
            rule = self.conclude_rule(total, found.rule, dtype)
            return Found(found.round + 1, rule, ranked=found.round + 1 == self.ranking_rounds(dtype))
        return replace(found, round=found.round + 1, norms=total)

    def start(self, known: Any) -> Found:
        found = known or Found()
        return replace(found, rule=self.start_rule(found.rule)) if found.ranked else found

    def merge(self, base: Tensor | None, experts: Sequence[Tensor], *more: Any) -> Tensor:
        assert base is not None
        found, *draws = more
        kept = self.sparsify([expert - base for expert in experts], found.rule, draws)
        factors = self.factors(found.norms)
        mix = agreeing_sum if self.consensus else plain_sum
        multipliers = [c * f for c, f in zip(self.coefficient, factors, strict=True)]
        mixed = mix(kept, multipliers, divisor_terms(self.divisor, self.coefficient))
        return base + (mixed if self.scale == 1 else mixed * self.scale)

    def sparsify(self, deltas: Sequence[Tensor], rule: Any, draws: Sequence[Sequence[Draws]]) -> list[Tensor]:
        return [
            delta if self.density[i] >= 1 else self.keep(i, delta, rule, draws[0][i] if draws else None)
            for i, delta in enumerate(deltas)
        ]

    def factors(self, norms: Tensor | None) -> list[float]:
        """What the kept entries of each expert are multiplied by."""
        if self.rescale == "inverse_density":
            return [1 / density for density in self.density]
        if norms is None:
            return [1.0] * len(self.density)
        return [1.0 if min(pair) < 1e-7 else pair[0] / pair[1] for pair in norms.tolist()]
