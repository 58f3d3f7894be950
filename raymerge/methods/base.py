"""What a merging method is: a frozen dataclass whose fields are its settings.

`TensorMethod` merges tensors. `StatisticsMethod` looks at all chunks of a tensor (or of the
whole model) first: what `measure` returns adds up over chunks, tensors, shards and machines,
and `conclude` turns the total into what the next round or `merge` needs.

The same instance serves every chunk of a tensor. Chunks of one tensor come in order, each cut at
a multiple of `unit(shape)` entries: 1 lets the runner cut anywhere (a flat chunk arrives), the
row width keeps rows whole (a (rows, width) chunk arrives), else the tensor arrives as it is.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from math import prod
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from raymerge.errors import RecipeError
from raymerge.ops.randomness import Draws

Scope = Literal["tensor", "model"]

# An instance holds one number per expert; a recipe gives one number for all, or one per expert.
PerExpert = tuple[float, ...]


def per_expert(default: float | None) -> Any:
    """A setting with one value per expert; None means that the recipe must give it."""
    return field(metadata={"per_expert": True, "default": default})


def is_per_expert(setting: Field[Any]) -> bool:
    return bool(setting.metadata.get("per_expert", False))


def default_of(setting: Field[Any]) -> Any:
    """The default of a setting, or MISSING if the recipe must give it."""
    if is_per_expert(setting):
        default = setting.metadata["default"]
        return MISSING if default is None else default
    return setting.default


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorMethod(ABC):
    """A method that merges tensor by tensor, a pure function of base, experts and settings."""

    needs_base: ClassVar[bool] = True
    """The recipe must name a base; `merge` gets its tensor."""
    uses_base: ClassVar[bool] = True
    """`merge` reads the base where the recipe names one (False: the base only lends its config)."""
    symmetric: ClassVar[bool] = True
    """With equal settings for all, the order of the experts does not matter (up to float rounding)."""
    elementwise: ClassVar[bool] = False
    """Any entry can be merged without looking at the others (once the statistics are known)."""
    random: ClassVar[bool] = False
    """`measure` and `merge` draw at random; they get one `Draws` per expert."""
    num_experts: ClassVar[tuple[int, int | None]] = (1, None)
    """Smallest and largest number of experts."""
    output: ClassVar[Literal["model", "adapter", "moe"]] = "model"

    def unit(self, shape: tuple[int, ...]) -> int:
        """Entries that must stay together in one chunk of a tensor of `shape`."""
        return 1 if self.elementwise else max(1, prod(shape))

    def scratch_copies(self, num_experts: int) -> int:
        """Float32 copies of a chunk that merging needs at once beside its inputs."""
        return 6 + 2 * num_experts

    def check(self) -> None:
        """Raise RecipeError if the settings contradict each other."""

    @abstractmethod
    def merge(self, base: Tensor | None, experts: Sequence[Tensor], *more: Any) -> Tensor:
        """Merge one chunk: same shape and dtype in and out."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StatisticsMethod(TensorMethod):
    """A method that needs statistics of the whole tensor, or the whole model, before it merges."""

    elementwise: ClassVar[bool] = True
    scoped_settings: ClassVar[tuple[str, ...]] = ()
    """Settings that `measure` and `conclude` read; with scope `model` they are the same for all tensors."""

    @property
    def scope(self) -> Scope:
        """What one set of statistics covers."""
        return "tensor"

    def rounds(self, dtype: torch.dtype) -> int:
        """How many times the data is measured before it is merged; 0 if these settings need no statistics."""
        return 1

    @abstractmethod
    def measure(self, base: Tensor | None, experts: Sequence[Tensor], known: Any, *draws: Any) -> Tensor:
        """Statistics of one chunk, a tensor that adds up; `known` is `start` of what was concluded before."""

    @abstractmethod
    def conclude(self, total: Tensor, known: Any, dtype: torch.dtype) -> Any:
        """Turn the sum over all chunks into what the next round, or `merge`, needs (picklable)."""

    def start(self, known: Any) -> Any:
        """What one pass over one tensor gets: `known`, or state that lives from chunk to chunk."""
        return known


@dataclass(frozen=True, kw_only=True, slots=True)
class LearnedMethod(TensorMethod):
    """A method that fits coefficients to calibration data; `merge` is what it starts from, and what it leaves
    where it fits nothing. Settings that are not per expert are the same for all tensors.
    """


def merge_whole(
    method: TensorMethod,
    base: Tensor | None,
    experts: Sequence[Tensor],
    *,
    seed: int = 0,
    tensor: str = "tensor",
    chunk: int | None = None,
) -> Tensor:
    """Merge tensors in memory, whole or `chunk` entries at a time: what the runners do, without files.

    Shapes and dtypes of all tensors are equal; the result has the same.
    """
    first = experts[0]
    shape = tuple(first.shape)
    if not first.numel():
        return first.clone()
    unit = method.unit(shape)
    size = first.numel() if chunk is None else max(unit, chunk // unit * unit)
    known: Any = None

    def cut(start: int) -> tuple[Tensor | None, list[Tensor]]:
        return (
            None if base is None else shaped(base.flatten()[start : start + size], unit, shape),
            [shaped(expert.flatten()[start : start + size], unit, shape) for expert in experts],
        )

    def draws() -> tuple[list[Draws], ...]:
        return ([Draws(seed, tensor, str(i)) for i in range(len(experts))],) if method.random else ()

    starts = range(0, first.numel(), max(1, size))
    if isinstance(method, StatisticsMethod):
        for _ in range(method.rounds(first.dtype)):
            drawn, state = draws(), method.start(known)
            total = sum(method.measure(*cut(start), state, *drawn) for start in starts)
            assert isinstance(total, Tensor)
            known = method.conclude(total, known, first.dtype)
    drawn = draws()
    begun = begin(method, known)
    parts = [method.merge(*cut(start), *begun, *drawn).flatten() for start in starts]
    return torch.cat(parts).view(shape)


def begin(method: TensorMethod, known: Any) -> tuple[Any, ...]:
    """What `merge` gets after base and experts: the statistics, if the method has any."""
    return (method.start(known),) if isinstance(method, StatisticsMethod) else ()


def shaped(chunk: Tensor, unit: int, shape: tuple[int, ...]) -> Tensor:
    """Give a flat chunk the shape a method with this unit expects; a scalar is a row of one entry."""
    if unit == max(1, prod(shape)):
        return chunk.view(shape) if shape else chunk
    return chunk if unit == 1 and shape[-1] != 1 else chunk.view(-1, unit)


def setting_fields(method: type[TensorMethod]) -> dict[str, Field[Any]]:
    """The settings of a method by name, in the order they are written."""
    return {setting.name: setting for setting in fields(method)}


def require(condition: bool, message: str) -> None:
    """Raise RecipeError unless a setting is as it must be."""
    if not condition:
        raise RecipeError(message)
