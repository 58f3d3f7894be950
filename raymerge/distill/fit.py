"""Fit one unit, a block or what follows the last one, to its teachers: epochs over the batches in a seeded order."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from raymerge.distill.engine import Engine, Group
from raymerge.errors import LearningError
from raymerge.ops.randomness import seeded

# A plateau is seen over this many epochs.
PLATEAU_EPOCHS = 3

Samples = Callable[[int], tuple[Any, Tensor, Tensor | None]]
"""The sample, teacher's output and mask of a batch, by its number."""

Tell = Callable[[str, Sequence[float], bool], None]
"""Told after each epoch: unit, losses so far, whether it was the last."""


@dataclass(frozen=True, kw_only=True, slots=True)
class UnitFit:
    """How a unit was fitted: the loss of each epoch, summed over all samples, and the time it took."""

    unit: str
    losses: tuple[float, ...]
    elapsed_seconds: float


def fit(
    unit: str,
    engine: Engine,
    samples: Samples,
    num_batches: int,
    *,
    epochs: int,
    plateau: float,
    seed: int,
    group: Group,
    tell: Tell,
) -> UnitFit:
    """Minimise the engine's objective over all batches, `epochs` times.

    With a `plateau` above 0 it ends when the loss has fallen by less than that share over three epochs. Raises
    LearningError if the loss is not finite.
    """
    begun = time.perf_counter()
    losses: list[float] = []
    for epoch in range(epochs):
        total = 0.0
        for number in _order(seed, unit, epoch, num_batches):
            total += engine.step(*samples(number))
        losses.append(group.add_up(total))
        if not math.isfinite(losses[-1]):
            raise LearningError(f"{unit}: the loss is not finite in epoch {epoch + 1}; lower settings.lr")
        ended = epoch + 1 == epochs or _is_flat(losses, plateau)
        tell(unit, losses, ended)
        if ended:
            break
    engine.gather()
    return UnitFit(unit=unit, losses=tuple(losses), elapsed_seconds=time.perf_counter() - begun)


def _order(seed: int, unit: str, epoch: int, count: int) -> list[int]:
    """Numbers of batches in an order that depends on nothing but the seed, the unit and the epoch."""
    order: list[int] = torch.randperm(count, generator=seeded(seed, unit, epoch)).tolist()
    return order


def _is_flat(losses: Sequence[float], plateau: float) -> bool:
    if not plateau or len(losses) <= PLATEAU_EPOCHS:
        return False
    before, now = losses[-1 - PLATEAU_EPOCHS], losses[-1]
    return before - now < plateau * before
