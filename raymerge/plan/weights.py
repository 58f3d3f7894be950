"""Whole parameters of a plan's tensors in memory, for methods that learn: merged, an expert's, task vectors.

Everything is float32 and goes by its name in the model's trunk.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from raymerge.checkpoint.header import DTYPES
from raymerge.checkpoint.reader import Reader
from raymerge.distill.student import Weights
from raymerge.models.trunk import Trunk
from raymerge.plan.execute import CHUNK, expect, read_source
from raymerge.plan.schema import Plan, PlannedTensor, Source

Entries = Callable[[Sequence[Tensor]], Tensor]


class PlanWeights:
    """Reads what a plan names; one tensor at a time beside what it returns."""

    def __init__(self, plan: Plan, trunk: Trunk, reader: Reader) -> None:
        self._plan = plan
        self._trunk = trunk
        self._reader = reader
        self._methods = [call.build() for call in plan.calls]
        self._experts = [model.name for model in plan.models if model.name != "base"]
        self.num_experts = len(self._experts)
        self._tensors: dict[str, list[PlannedTensor]] = {}
        for shard in plan.shards:
            for tensor in () if shard.is_head else shard.tensors:
                parameter, _ = trunk.conversion.parameter_of(tensor.name)
                if parameter is not None:
                    self._tensors.setdefault(parameter, []).append(tensor)

    def tensors_of(self, names: Sequence[str]) -> list[PlannedTensor]:
        """The tensors of the output that some parameters are made of."""
        return [tensor for name in names for tensor in self._tensors.get(name, ())]

    @property
    def missing(self) -> set[str]:
        """Parameters around the blocks that the output does not have."""
        return self._trunk.outside.keys() - self._tensors.keys()

    def initial(self, names: Sequence[str], written: bool = False) -> Weights:
        """The parameters merged with the coefficients of the start; `written`: rounded as they will be stored."""
        return self._collect(names, lambda tensor: self._merged(tensor, written))

    def deltas(self, names: Sequence[str], summed: bool) -> list[Weights]:
        """The experts' task vectors; `summed`: only the sum of their absolute values."""
        if summed:
            return [self._collect(names, self._span)]
        return [self._collect(names, partial(self._delta, expert=expert)) for expert in self._experts]

    def delta(self, name: str, expert: str) -> Tensor:
        """The task vector of an expert for one parameter."""
        return self._collect([name], lambda tensor: self._delta(tensor, expert))[name]

    def start(self, name: str, expert: str) -> Tensor:
        """An expert's coefficients of one parameter at the start: settings may differ from tensor to tensor."""
        return self._collect([name], lambda tensor: self._start(tensor, expert))[name]

    def of_expert(self, expert: int, names: Sequence[str]) -> Weights:
        """The parameters of an expert."""
        return self._collect(names, lambda tensor: self._read(self._source_of(tensor, self._experts[expert]), tensor))

    def as_written(self, tensors: dict[str, Tensor]) -> Weights:
        """Tensors by their names in the output, rounded as they are stored, as parameters."""
        dtypes = {t.name: DTYPES[t.dtype] for parts in self._tensors.values() for t in parts if t.name in tensors}
        rounded = {name: value.to(dtypes[name]).to(torch.float32) for name, value in tensors.items()}
        return self._trunk.conversion.to_model(rounded)

    def _collect(self, names: Sequence[str], read: Callable[[PlannedTensor], Tensor]) -> dict[str, Tensor]:
        return self._trunk.conversion.to_model({tensor.name: read(tensor) for tensor in self.tensors_of(names)})

    def _merged(self, tensor: PlannedTensor, written: bool) -> Tensor:
        if tensor.call is None:
            assert tensor.base is not None
            return self._read(tensor.base, tensor)
        method = self._methods[tensor.call]
        found = self._fill(tensor, lambda parts: method.merge(parts[0], parts[1:]))
        return found.to(DTYPES[tensor.dtype]).to(torch.float32) if written else found

    def _span(self, tensor: PlannedTensor) -> Tensor:
        if tensor.call is None:
            return torch.zeros(tensor.shape)
        return self._fill(tensor, lambda parts: torch.stack([(part - parts[0]).abs() for part in parts[1:]]).sum(0))

    def _delta(self, tensor: PlannedTensor, expert: str) -> Tensor:
        source = next((source for source in tensor.experts if source.name == expert), None)
        if tensor.call is None or source is None:
            return torch.zeros(tensor.shape)
        return self._fill(replace(tensor, experts=(source,)), lambda parts: parts[1] - parts[0])

    def _start(self, tensor: PlannedTensor, expert: str) -> Tensor:
        if tensor.call is None:
            return torch.zeros(tensor.shape)
        settings = self._plan.calls[tensor.call].settings["coefficient"]
        given = {source.name: value for source, value in zip(tensor.experts, settings, strict=True)}
        return torch.full(tensor.shape, given.get(expert, 0.0))

    def _source_of(self, tensor: PlannedTensor, expert: str) -> Source:
        """The expert's own tensor, or the base's where it has none."""
        found = next((source for source in tensor.experts if source.name == expert), tensor.base)
        assert found is not None
        return found

    def _read(self, source: Source, tensor: PlannedTensor) -> Tensor:
        stored = read_source(self._reader, source, 0, tensor.num_elements)
        return stored.to(torch.float32).view(tensor.shape)

    def _fill(self, tensor: PlannedTensor, entries: Entries) -> Tensor:
        """A tensor computed chunk by chunk from base and experts."""
        found = torch.empty(tensor.num_elements)
        expect(self._reader, tensor.sources)
        for first in range(0, tensor.num_elements, CHUNK):
            count = min(CHUNK, tensor.num_elements - first)
            parts = [read_source(self._reader, source, first, count).to(torch.float32) for source in tensor.sources]
            found[first : first + count] = entries(parts)
        return found.view(tensor.shape)
