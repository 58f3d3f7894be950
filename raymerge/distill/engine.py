"""Who takes the optimizer's steps, and who else takes part: one process here, DeepSpeed's groups in run/."""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from raymerge.distill.student import Objective


class Group(Protocol):
    """The ranks that fit the same blocks on their parts of each batch."""

    rank: int
    size: int

    def add_up(self, value: float) -> float:
        """The sum of every rank's value."""
        ...

    def wait(self) -> None:
        """Return when every rank has called it."""
        ...


class Alone:
    """A group of one."""

    rank = 0
    size = 1

    def add_up(self, value: float) -> float:
        return value

    def wait(self) -> None:
        pass


class Engine(Protocol):
    """Minimises an objective, step by step."""

    def step(self, *inputs: Any) -> float:
        """One optimizer step on this rank's part of a batch; its loss before the step."""
        ...

    def gather(self) -> None:
        """Make the objective's parameters whole on every rank, when all steps are done."""
        ...


MakeEngine = Callable[[Objective, float], Engine]
"""An engine for an objective and a learning rate."""


class PlainEngine:
    """Adam in one process."""

    def __init__(self, objective: Objective, lr: float) -> None:
        self._objective = objective
        self._optimizer = torch.optim.Adam(objective.parameters(), lr=lr, fused=True)

    def step(self, *inputs: Any) -> float:
        loss: Tensor = self._objective(*inputs)
        loss.backward()  # type: ignore[no-untyped-call]
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    def gather(self) -> None:
        pass
