"""DARE (Yu et al. 2024, arXiv:2311.03099): drop entries of task vectors at random, rescale the rest.

`dare_linear` adds the sparse task vectors up, `dare_ties` elects signs first, and `darex_q`
(Deng et al. 2025, arXiv:2410.09344) divides by a given q instead of the kept fraction: with most
entries of large task vectors dropped, a q above the density changes outputs less.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from raymerge.methods.base import PerExpert, per_expert, require
from raymerge.methods.sparse import Rescale, SparseTaskVectors
from raymerge.ops.consensus import Divisor
from raymerge.ops.randomness import Draws


@dataclass(frozen=True, kw_only=True, slots=True)
class DareLinear(SparseTaskVectors):
    """`base + scale * sum_i c_i r_i m_i (x_i - base)`, each entry of m_i 1 with probability density."""

    random: ClassVar[bool] = True

    coefficient: PerExpert = per_expert(default=0.3)
    """Multiplier of each expert's task vector."""

    rescale: Rescale = "inverse_density"
    """Divide kept entries by density (the paper), scale them to keep the L1 norm (mergekit), or neither."""

    def keep(self, expert: int, delta: Tensor, rule: Any, draws: Draws | None) -> Tensor:
        assert draws is not None
        return delta * draws.bernoulli(delta, self.density[expert])


@dataclass(frozen=True, kw_only=True, slots=True)
class DareTies(DareLinear):
    """DARE, then the sign consensus of TIES."""

    consensus: ClassVar[bool] = True

    coefficient: PerExpert = per_expert(default=1.0)
    """Multiplier of each expert's task vector; it weighs the vote too."""

    divisor: Divisor = "count"
    """Divide by the number of agreeing experts, by their coefficients, or by nothing (mergekit)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DarexQ(DareLinear):
    """DARE whose kept entries are divided by q."""

    q: PerExpert = per_expert(default=None)
    """What kept entries are divided by, positive; the paper finds values above the density best."""

    rescale: Rescale = "none"
    """Dividing by q is the rescaling; only `none` is allowed."""

    def check(self) -> None:
        DareLinear.check(self)
        require(all(q > 0 for q in self.q), f"q {list(self.q)} must be positive")
        require(self.rescale == "none", f"rescale is {self.rescale!r}; q is the rescaling, set none")

    def factors(self, norms: Tensor | None) -> list[float]:
        return [1 / q for q in self.q]
