"""The merged block as a function of what is trained.

Element-wise coefficients need one trained tensor, whatever the number of experts: all coefficients of an element
get the same step up to sign, so `t(u) = t(c) + s u` with `s = sum_i |d_i|`, and `L_i = c_i + sign(d_i) u`
recovers them. Adam takes the same steps on u as on the E coefficient tensors, but for its eps.

Shapes: E experts; a parameter's own shape for all tensors of it. Everything is float32.
"""

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from raymerge.distill.settings import Granularity

Weights = Mapping[str, Tensor]
"""Parameters by their names."""


class Student(nn.Module):
    """Trained numbers, and the merged parameters they stand for."""

    @abstractmethod
    def forward(self) -> dict[str, Tensor]:
        """The merged parameters, by name."""

    @abstractmethod
    def moved(self) -> dict[str, Tensor]:
        """By how much coefficients have moved, by name: u itself, or one number per expert (E,)."""

    @abstractmethod
    def move_to(self, moved: Weights) -> None:
        """Start from where another student ended."""


class ElementStudent(Student):
    """A coefficient for each element: trains `u`, of the size of one checkpoint."""

    def __init__(self, initial: Weights, span: Weights) -> None:
        super().__init__()
        self._names = tuple(initial)
        self._frozen = [(initial[name], span[name]) for name in initial]
        # Parameters of this very module, so that ZeRO gathers them when it is called.
        for number, value in enumerate(initial.values()):
            self.register_parameter(f"u{number}", nn.Parameter(torch.zeros_like(value)))

    def _trained(self, number: int) -> Tensor:
        return self.get_parameter(f"u{number}")

    def forward(self) -> dict[str, Tensor]:
        return {
            name: torch.addcmul(initial, span, self._trained(number).to(initial.dtype))
            for number, (name, (initial, span)) in enumerate(zip(self._names, self._frozen, strict=True))
        }

    def moved(self) -> dict[str, Tensor]:
        return {name: self._trained(number).detach() for number, name in enumerate(self._names)}

    @torch.no_grad()
    def move_to(self, moved: Weights) -> None:
        for number, name in enumerate(self._names):
            self._trained(number).copy_(moved[name])


class ScalarStudent(Student):
    """A coefficient for each group of parameters: trains E numbers each, and holds all task vectors."""

    def __init__(self, initial: Weights, deltas: Sequence[Weights], groups: Mapping[str, str]) -> None:
        super().__init__()
        self._initial = dict(initial)
        self._deltas = tuple(dict(delta) for delta in deltas)
        numbers = {group: number for number, group in enumerate(dict.fromkeys(groups.values()))}
        self._row_of = {name: numbers[groups[name]] for name in initial}
        self.register_parameter("rows", nn.Parameter(torch.zeros(len(numbers), len(deltas))))

    def _row(self, name: str) -> Tensor:
        rows: Tensor = self.get_parameter("rows")
        return rows[self._row_of[name]]

    def forward(self) -> dict[str, Tensor]:
        found = {}
        for name, merged in self._initial.items():
            row = self._row(name)
            for expert, delta in enumerate(self._deltas):
                merged = merged + row[expert] * delta[name]
            found[name] = merged
        return found

    def moved(self) -> dict[str, Tensor]:
        return {name: self._row(name).detach() for name in self._initial}

    @torch.no_grad()
    def move_to(self, moved: Weights) -> None:
        for name in self._initial:
            self._row(name).copy_(moved[name])


def make_student(
    granularity: Granularity, initial: Weights, deltas: Sequence[Weights], blocks: Mapping[str, str]
) -> Student:
    """A student that starts at the merged parameters `initial`.

    `deltas` are the experts' task vectors; with element-wise coefficients the one sum of their absolute values.
    `blocks` names the block of each parameter.
    """
    if granularity == "element":
        (span,) = deltas
        return ElementStudent(initial, span)
    groups = {"tensor": {name: name for name in initial}, "block": blocks, "task": dict.fromkeys(initial, "all")}
    return ScalarStudent(initial, deltas, groups[granularity])


class Objective(nn.Module):
    """A student where it works: the squared distance of its output from the teacher's, over all that is no padding.

    `run(weights, sample)` is the output of the block (or of what follows the last one) for a sample.
    """

    def __init__(self, student: Student, run: Callable[[Weights, Any], Tensor], dtype: torch.dtype) -> None:
        super().__init__()
        self.student = student
        self._run = run
        self._dtype = dtype

    def forward(self, sample: Any, target: Tensor, mask: Tensor | None) -> Tensor:
        merged = {name: value.to(self._dtype) for name, value in self.student().items()}
        return squared_distance(self._run(merged, sample), target, mask)


def squared_distance(found: Tensor, target: Tensor, mask: Tensor | None) -> Tensor:
    """Sum of squared differences, float32 or wider; rows or tokens whose `mask` is 0 do not count."""
    dtype = torch.promote_types(found.dtype, torch.float32)
    distance = (found.to(dtype) - target.to(dtype)).square()
    if mask is not None:
        distance = distance * mask.to(distance.dtype).reshape(*mask.shape, *[1] * (distance.ndim - mask.ndim))
    return distance.sum()
