"""The samples on their way through the blocks: once as the merged model's, once as their own expert's.

Of each batch a rank holds its own rows. A block's outputs replace its inputs, so two hidden states per batch are
kept, whatever the number of blocks.

Shapes: B rows, T tokens, D width.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from raymerge.distill.cache import ActivationCache
from raymerge.distill.engine import Group
from raymerge.distill.student import Weights
from raymerge.learn.calibration import Batch
from raymerge.models.stacks import Stack
from raymerge.models.trunk import Call, Flow, Trunk, pad_mask

Path = Literal["student", "teacher"]

# Names of what one walk tells another begin so.
HANDED = "handed."
END = "end."
COUNT = "count."


@dataclass(frozen=True, slots=True)
class Part:
    """This rank's rows of a batch: the batch's number and expert, the inputs, and which rows count (None: all)."""

    number: int
    expert: int
    inputs: Mapping[str, Tensor]
    counted: Tensor | None


class Walk:
    """Where the samples of this rank are: at the entrance of some block of some stack."""

    def __init__(self, trunk: Trunk, batches: Sequence[Batch], group: Group, dtype: torch.dtype) -> None:
        self.trunk = trunk
        self.dtype = dtype
        self.parts = [_part(number, batch, group, trunk.device) for number, batch in enumerate(batches)]
        self.cache = ActivationCache()
        self._calls: dict[tuple[Path, int], list[Call]] = {}
        self._handed: dict[tuple[Path, int], tuple[Any, ...]] = {}
        self._left: list[str] = []

    def enter(self, stack: Stack, path: Path, expert: int | None, outside: Weights, first: Weights) -> None:
        """Take the samples of one expert (None: all) to the first block of a stack.

        `outside` are the parameters around the blocks of the model that is followed, `first` those of its first
        block, by their names within it; they only serve to see what blocks hand on.
        """
        around = self.cast(outside)
        for part in self._of(expert):
            done = self.ends(path, part)
            flow, calls = self.trunk.record(stack, around, part.inputs, done)
            if len(calls) < stack.num_blocks:
                with torch.no_grad():
                    behind = self.trunk.run_block(stack, 0, self.cast(first), flow, calls[0])
                self.trunk.num_handed[stack.name] = len(behind.handed)
                flow, calls = self.trunk.record(stack, around, part.inputs, done)
            self._calls[path, part.number] = calls
            self._set(path, part, flow)

    @torch.no_grad()
    def advance(self, stack: Stack, block: int, path: Path, expert: int | None, weights: Weights) -> None:
        """Take the samples of one expert (None: all) through a block."""
        cast = self.cast(weights)
        for part in self._of(expert):
            self._set(path, part, self.trunk.run_block(stack, block, cast, *self.sample(path, part, block)))

    def follow(self, path: Path, other: Path) -> None:
        """Put the samples of one path where those of the other are."""
        for part in self.parts:
            self._set(path, part, self._flow(other, part))

    def leave(self, stack: Stack, paths: Sequence[Path]) -> None:
        """Note where the samples of some paths have come out of a stack."""
        self._left.append(stack.name)
        for path in paths:
            for part in self.parts:
                self.cache.put(f"{path}-{part.number}-end-{stack.name}", self.hidden(path, part))

    def state(self, path: Path, part: Part) -> dict[str, Tensor]:
        """Where a part is, for another walk to go on from: in its stack, and at the ends of those that were left."""
        flow = self._flow(path, part)
        handed = {f"{HANDED}{number}": value for number, value in enumerate(flow.handed) if value is not None}
        ends = {f"{END}{name}": value for name, value in self.ends(path, part).items()}
        counts = {f"{COUNT}{name}": torch.tensor(count) for name, count in self.trunk.num_handed.items()}
        return {"hidden": flow.hidden, **handed, **ends, **counts}

    def take_ends(self, path: Path, part: Part, state: Weights) -> None:
        """Have left the stacks that another walk has."""
        for name, value in state.items():
            if name.startswith(COUNT):
                self.trunk.num_handed[name.removeprefix(COUNT)] = int(value)
        self._left = [name.removeprefix(END) for name in state if name.startswith(END)]
        for name in self._left:
            self.cache.put(f"{path}-{part.number}-end-{name}", state[f"{END}{name}"].to(self.trunk.device))

    def take_flow(self, stack: Stack, path: Path, part: Part, state: Weights) -> None:
        """Be where another walk is in a stack, which this one has entered."""
        here = {name: value.to(self.trunk.device) for name, value in state.items()}
        handed = tuple(here.get(f"{HANDED}{number}") for number in range(self.trunk.num_handed[stack.name]))
        self._set(path, part, Flow(here["hidden"], handed))

    def begin_again(self) -> None:
        """Forget all stacks that were left."""
        self._left.clear()

    def sample(self, path: Path, part: Part, block: int) -> tuple[Flow, Call]:
        """What the next block gets for a part of a batch."""
        return self._flow(path, part), self._calls[path, part.number][block]

    def hidden(self, path: Path, part: Part) -> Tensor:
        """The hidden states (B, T, D) of a part, where they are."""
        return self.cache.get(f"{path}-{part.number}")

    def ends(self, path: Path, part: Part) -> dict[str, Tensor]:
        """The hidden states at the end of each stack that was left."""
        return {name: self.cache.get(f"{path}-{part.number}-end-{name}") for name in self._left}

    def mask(self, stack: Stack, part: Part, target: Tensor) -> Tensor | None:
        """Which tokens (B, T), or rows (B,), of a part's target count; None: all."""
        mask = pad_mask(part.inputs, target, is_decoder=stack.name.startswith("decoder")) if target.ndim == 3 else None
        if part.counted is None:
            return mask
        return part.counted if mask is None else mask * part.counted[:, None].to(mask.dtype)

    def cast(self, weights: Weights) -> dict[str, Tensor]:
        """Weights in the dtype of the computation, on its device."""
        return {name: value.to(self.trunk.device, self.dtype) for name, value in weights.items()}

    def _flow(self, path: Path, part: Part) -> Flow:
        return Flow(self.hidden(path, part), self._handed.get((path, part.number), ()))

    def _of(self, expert: int | None) -> Iterator[Part]:
        return (part for part in self.parts if expert is None or part.expert == expert)

    def _set(self, path: Path, part: Part, flow: Flow) -> None:
        self.cache.put(f"{path}-{part.number}", flow.hidden)
        self._handed[path, part.number] = flow.handed


def _part(number: int, batch: Batch, group: Group, device: str) -> Part:
    """The rows of a batch that fall to a rank; one without rows gets the first, which does not count there."""
    rows = list(range(batch.num_rows))[group.rank :: group.size]
    counted = None if rows else torch.zeros(1, device=device)
    inputs = {name: value[rows or [0]].to(device) for name, value in batch.inputs.items()}
    return Part(number, batch.expert, inputs, counted)
