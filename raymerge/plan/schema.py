"""The plan: exactly what will be done, as data. Frozen, picklable, JSON both ways."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Annotated, Any

import torch
from pydantic import AfterValidator, TypeAdapter

from raymerge import methods
from raymerge.checkpoint.header import DTYPES
from raymerge.checkpoint.location import Location
from raymerge.checkpoint.model_folder import HEADS
from raymerge.checkpoint.reader import StoredTensor
from raymerge.learn.calibration import Calibration
from raymerge.methods.base import TensorMethod
from raymerge.models.vocabulary import RowRun


@dataclass(frozen=True, kw_only=True, slots=True)
class Model:
    """A checkpoint that is read: `base` or an expert's name, and what identifies its bytes."""

    name: str
    location: Location
    fingerprint: str


def _list_as_tuple(value: Any) -> Any:
    # JSON has lists only; per-expert settings are tuples.
    return tuple(value) if isinstance(value, list) else value


@dataclass(frozen=True, kw_only=True, slots=True)
class Call:
    """A method with all its settings, as used for some tensors."""

    method: str
    settings: Mapping[str, Annotated[Any, AfterValidator(_list_as_tuple)]]

    def build(self) -> TensorMethod:
        return methods.find(self.method)(**self.settings)


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """One input of a tensor: a stored tensor, or rows of several, aligned by token.

    `name` is the expert's, or `base`. With `rows`, run parts number the entries of `tensors`.
    """

    name: str
    tensors: tuple[StoredTensor, ...]
    rows: tuple[RowRun, ...] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedTensor:
    """One tensor of the output: merged by `call`, or copied from `base` where `call` is None.

    `dtype` and `arithmetic` are safetensors dtype names. `held`: all of its inputs are kept in memory
    between passes; otherwise they are read again for each pass.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    arithmetic: str
    call: int | None
    base: Source | None
    experts: tuple[Source, ...] = ()
    held: bool = False

    @property
    def num_elements(self) -> int:
        return prod(self.shape)

    @property
    def sources(self) -> tuple[Source, ...]:
        return self.experts if self.base is None else (self.base, *self.experts)


@dataclass(frozen=True, kw_only=True, slots=True)
class Shard:
    """One file of the output: path below the output folder, and its tensors in order of their bytes."""

    file: str
    tensors: tuple[PlannedTensor, ...]

    @property
    def is_head(self) -> bool:
        """It is what an expert keeps for itself, no part of the merged model."""
        return self.file.startswith(f"{HEADS}/")

    @property
    def layout(self) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
        """Name, dtype and shape of its tensors, in order."""
        return [(tensor.name, DTYPES[tensor.dtype], tensor.shape) for tensor in self.tensors]


@dataclass(frozen=True, kw_only=True, slots=True)
class Tokenizer:
    """The output's tokenizer: whose it is (number of the model), and tokens added to it."""

    model: int
    added: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class UnitCost:
    """What fitting a unit takes in one worker, in bytes.

    State: the trained numbers, their gradients and moments, float32. Frozen: the merged weights of the start and
    the sum of the task vectors' magnitudes (or every task vector). Step: the merged weights of a step with their
    gradients, and the activations within the block. Cache: the activations of this worker's samples.
    """

    name: str
    num_parameters: int
    state_bytes: int
    frozen_bytes: int
    step_bytes: int
    cache_bytes: int

    @property
    def total_bytes(self) -> int:
        return self.state_bytes + self.frozen_bytes + self.step_bytes + self.cache_bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """What executing the plan takes, in bytes; `units`: of what is learned, by `num_learners` workers at once.

    `machine_bytes` is the memory of the machine that planned.
    """

    bytes_read: int
    bytes_written: int
    peak_bytes_per_worker: int
    baseline_bytes: int
    units: tuple[UnitCost, ...] = ()
    num_learners: int = 0
    machine_bytes: int = 0

    @property
    def fits_here(self) -> bool:
        """All workers that learn have room on the machine that planned."""
        return self.num_learners * self.peak_bytes_per_worker <= self.machine_bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class Unit:
    """A block, or what follows the last one, that is fitted as one: its files, as numbers of shards, and its size."""

    name: str
    shards: tuple[int, ...]
    num_parameters: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Distillation:
    """The learned part of a plan, in the order it is done.

    `blocks` names the list of blocks, empty where it is clear; `keep_moved`: coefficients are written; `precision` is
    the dtype in which blocks run.
    """

    units: tuple[Unit, ...]
    blocks: str
    calibrations: tuple[Calibration, ...]
    keep_moved: bool
    precision: str

    def unit(self, name: str) -> Unit:
        return next(unit for unit in self.units if unit.name == name)


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """All of a merge. `config` is the output's config.json; `notes` are things a user should know."""

    version: str
    method: str
    models: tuple[Model, ...]
    calls: tuple[Call, ...]
    shards: tuple[Shard, ...]
    seed: int
    config: Mapping[str, Any]
    head_experts: tuple[int, ...]
    tokenizer: Tokenizer
    chat_template: str | None
    notes: tuple[str, ...]
    cost: Cost
    distillation: Distillation | None = None

    @property
    def locations(self) -> tuple[Location, ...]:
        return tuple(model.location for model in self.models)

    @property
    def learned_shards(self) -> frozenset[int]:
        """Numbers of the shards that are written as their units are fitted."""
        units = self.distillation.units if self.distillation else ()
        return frozenset(number for unit in units for number in unit.shards)

    @property
    def num_tensors(self) -> int:
        return sum(len(shard.tensors) for shard in self.shards)

    def to_json(self) -> str:
        return _ADAPTER.dump_json(self).decode()

    @staticmethod
    def from_json(text: str) -> "Plan":
        return _ADAPTER.validate_json(text)

    @property
    def digest(self) -> str:
        """Identifies the bytes of the output: inputs, settings and layout, not what it costs to make them."""
        plan = replace(self, cost=Cost(bytes_read=0, bytes_written=0, peak_bytes_per_worker=0, baseline_bytes=0))
        # The bytes of `to_json`, of which the shards are by far the most: one at a time.
        first = _ADAPTER.dump_json(plan, include=_BEFORE_SHARDS)
        found = hashlib.sha256(first[:-1] + b',"shards":[')
        for number, shard in enumerate(self.shards):
            tensors = tuple(replace(tensor, held=False) if tensor.held else tensor for tensor in shard.tensors)
            found.update((b"," if number else b"") + _SHARD_ADAPTER.dump_json(replace(shard, tensors=tensors)))
        last = _ADAPTER.dump_json(plan, exclude={*_BEFORE_SHARDS, "shards"})
        found.update(b"]," + last[1:])
        return found.hexdigest()

    def job(self, number: int, device: str) -> "ShardJob":
        """What a worker needs for one shard."""
        shard = self.shards[number]
        used = sorted({tensor.call for tensor in shard.tensors if tensor.call is not None})
        return ShardJob(
            shard=shard,
            locations=self.locations,
            calls={call: self.calls[call] for call in used},
            seed=self.seed,
            device=device,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardJob:
    """One shard of a plan, with all that a worker needs to execute it."""

    shard: Shard
    locations: tuple[Location, ...]
    calls: Mapping[int, Call]
    seed: int
    device: str = "cpu"


_ADAPTER = TypeAdapter(Plan)
_SHARD_ADAPTER = TypeAdapter(Shard)
_BEFORE_SHARDS = {"version", "method", "models", "calls"}
