"""Stages: groups of ranks that each fit a contiguous run of blocks, and hand the samples on to the next group."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from raymerge.models.stacks import Stack


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """Stage `number` of `count`, counted from 0."""

    number: int = 0
    count: int = 1

    @property
    def is_first(self) -> bool:
        return self.number == 0

    @property
    def is_last(self) -> bool:
        return self.number == self.count - 1

    def runs(self, stacks: Sequence[Stack]) -> list[tuple[Stack, range]]:
        """The blocks of this stage, stack by stack; stages have equal numbers of blocks, within one."""
        total = sum(stack.num_blocks for stack in stacks)
        first, end = total * self.number // self.count, total * (self.number + 1) // self.count
        found, before = [], 0
        for stack in stacks:
            run = range(max(0, first - before), min(stack.num_blocks, end - before))
            if run:
                found.append((stack, run))
            before += stack.num_blocks
        return found


class Passage(Protocol):
    """How the samples of a rank get from one stage to the rank of the same number in the next."""

    def give(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Hand something on to the next stage."""
        ...

    def take(self, key: str) -> Mapping[str, Tensor]:
        """What the stage before has handed on; waits for it."""
        ...


class NoPassage:
    """For a single stage: nobody is there to give to, or to take from."""

    def give(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        raise AssertionError(f"{key}: there is one stage only")

    def take(self, key: str) -> Mapping[str, Tensor]:
        raise AssertionError(f"{key}: there is one stage only")
