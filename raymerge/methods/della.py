"""DELLA-Merging (Deep et al. 2024, arXiv:2406.11617): drop entries by chance, small ones more often.

The probability that an entry is kept rises linearly with the rank of its magnitude in its row, from
density - epsilon to density + epsilon. The paper divides each kept entry by its probability; mergekit
scales to the L1 norm. `della` elects signs before adding up, `della_linear` does not.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from raymerge.methods.base import PerExpert, per_expert, require
from raymerge.methods.sparse import Rescale, SparseTaskVectors
from raymerge.ops.consensus import Divisor
from raymerge.ops.randomness import Draws
from raymerge.ops.sparsify import rank_probabilities


@dataclass(frozen=True, kw_only=True, slots=True)
class DellaLinear(SparseTaskVectors):
    """`base + scale * sum_i c_i m_i (x_i - base) / p_i`, each entry of m_i 1 with its probability p_i."""

    random: ClassVar[bool] = True

    epsilon: PerExpert = per_expert(default=0.15)
    """Half the spread of the probabilities; density - epsilon and density + epsilon lie in (0, 1)."""

    rescale: Rescale = "inverse_density"
    """Divide kept entries by their own probability (the paper), keep the L1 norm (mergekit), or neither."""

    def check(self) -> None:
        SparseTaskVectors.check(self)
        for density, epsilon in zip(self.density, self.epsilon, strict=True):
            require(
                density == 1 or (density - epsilon > 0 and density + epsilon < 1 and epsilon >= 0),
                f"density {density} -/+ epsilon {epsilon} must lie in (0, 1); give a smaller epsilon",
            )

    def unit(self, shape: tuple[int, ...]) -> int:
        return max(1, shape[-1]) if shape else 1

    def keep(self, expert: int, delta: Tensor, rule: Any, draws: Draws | None) -> Tensor:
        assert draws is not None
        probability = rank_probabilities(delta, self.density[expert], self.epsilon[expert])
        kept = delta * draws.bernoulli(delta, probability)
        return kept / probability.to(delta.dtype) if self.rescale == "inverse_density" else kept

    def factors(self, norms: Tensor | None) -> list[float]:
        # Dividing by the probabilities happened entry by entry, in `keep`.
        return [1.0] * len(self.density) if norms is None else SparseTaskVectors.factors(self, norms)


@dataclass(frozen=True, kw_only=True, slots=True)
class Della(DellaLinear):
    """DELLA with the sign consensus of TIES."""

    consensus: ClassVar[bool] = True

    divisor: Divisor = "count"
    """Divide by the number of agreeing experts, by their coefficients (mergekit), or by nothing."""
