"""Merge in memory and measure, again and again: what a trial of a search does instead of writing a checkpoint.

Base and experts are read from where they lie, which after the first trial is memory: the page cache, or for object
storage what the process keeps. The models that are measured are built once, and filled with each trial's tensors;
those of several experts share one trunk.
"""

import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from raymerge.checkpoint.header import DTYPES
from raymerge.checkpoint.index import open_checkpoint
from raymerge.checkpoint.kept import KEPT
from raymerge.checkpoint.model_folder import HEADS
from raymerge.distill.engine import Alone, PlainEngine
from raymerge.models import heads, load
from raymerge.models.conversion import Conversion
from raymerge.plan.build import build_plan
from raymerge.plan.execute import merge_into
from raymerge.plan.schema import Plan, Shard
from raymerge.recipe.schema import Recipe
from raymerge.run.distill import DistillJob, distill
from raymerge.run.merge import run_plan, silent, statistics
from raymerge.run.pool import LocalPool

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True)
class _Network:
    """A model that trials fill, but for the parameters `own`, which are its expert's head."""

    model: "PreTrainedModel"
    conversion: Conversion
    own: frozenset[str]


class Bench:
    """Keeps what trials have in common; what is read from object storage in half of the `memory_bytes` they leave."""

    def __init__(self, device: str = "cpu", memory_bytes: int = 0) -> None:
        self._device = device
        self._memory_bytes = memory_bytes
        self._tensors: dict[str, Tensor] = {}
        self._networks: dict[str | None, _Network] = {}
        self._config: Mapping[str, Any] | None = None

    def merge(self, recipe: Recipe, experts: Sequence[str | None]) -> tuple[dict[str | None, "PreTrainedModel"], float]:
        """The merged model of a recipe with the head of each expert (None: as it is), and the seconds of merging.

        The models are good until the next call. Raises UserError of every kind.
        """
        planned = build_plan(recipe)
        if self._config is None:
            # Merged tensors, and the models that they fill.
            needed = planned.cost.peak_bytes_per_worker + 2 * planned.cost.bytes_written
            KEPT.make_room(max(0, self._memory_bytes - needed) // 2)
        begun = time.perf_counter()
        self._merge(planned)
        elapsed = time.perf_counter() - begun
        if planned.config != self._config:
            self._networks.clear()
            self._config = planned.config
        filled: set[int] = set()
        # Experts without a head of their own share one model, whatever it ties.
        owners = {expert: expert if _head(planned, expert) else None for expert in experts}
        for owner in dict.fromkeys(owners.values()):
            if owner not in self._networks:
                self._networks[owner] = self._build(planned, owner)
            self._fill(self._networks[owner], filled)
        return {expert: self._networks[owner].model for expert, owner in owners.items()}, elapsed

    def _merge(self, planned: Plan) -> None:
        if planned.distillation is not None:
            self._tensors = _learned(planned, self._device)
            return
        trunk = [n for n, shard in enumerate(planned.shards) if not shard.is_head]
        wanted = {t.name: (t.shape, DTYPES[t.dtype]) for n in trunk for t in planned.shards[n].tensors}
        if {name: (tuple(value.shape), value.dtype) for name, value in self._tensors.items()} != wanted:
            self._tensors = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in wanted.items()}
        pool = LocalPool(1)
        known = statistics(planned, pool, silent)
        for _ in pool.map(lambda job: merge_into(self._tensors, job, known), [planned.job(n, "cpu") for n in trunk]):
            pass

    def _build(self, planned: Plan, expert: str | None) -> _Network:
        head = _head(planned, expert)
        where = f"the merge of {', '.join(model.name for model in planned.models)}"
        names: tuple[str, ...] = ()
        if head is None:
            model = heads.assemble(self._tensors, planned.config, where)
        else:
            owner = open_checkpoint(str(next(m.location for m in planned.models if m.name == expert)))
            names = tuple(tensor.name for tensor in head.tensors)
            model = heads.assemble(self._tensors, planned.config, where, owner, names)
        load.place(model, self._device)
        self._share_trunk(model)
        conversion = Conversion(model)
        parameters = (conversion.parameter_of(name)[0] for name in names)
        return _Network(model, conversion, frozenset(name for name in parameters if name is not None))

    def _share_trunk(self, model: "PreTrainedModel") -> None:
        other = next((network.model for network in self._networks.values()), None)
        prefix = model.base_model_prefix
        ours, theirs = getattr(model, prefix, None), getattr(other, prefix, None)
        if ours is None or theirs is None or type(ours) is not type(theirs):
            return
        if ours.state_dict().keys() == theirs.state_dict().keys():
            setattr(model, prefix, theirs)

    @torch.no_grad()
    def _fill(self, network: _Network, filled: set[int]) -> None:
        """Copy merged tensors to a model's parameters, but those that another model shares and has filled."""
        held = network.model.state_dict(keep_vars=True)
        for name, value in network.conversion.to_model(self._tensors).items():
            target = held[name]
            if name not in network.own and target.data_ptr() not in filled:
                target.copy_(value)
                filled.add(target.data_ptr())


def _head(planned: Plan, expert: str | None) -> Shard | None:
    """The file of what an expert keeps for itself."""
    file = f"{HEADS}/{expert}/model.safetensors"
    return next((shard for shard in planned.shards if shard.file == file), None)


def _learned(planned: Plan, device: str) -> dict[str, Tensor]:
    """A distillation's tensors, fitted in this process; it keeps its units in files, here in a temporary folder."""
    assert planned.distillation is not None
    with tempfile.TemporaryDirectory(prefix="raymerge-trial-") as folder:
        place = Path(folder)
        plain = [n for n in range(len(planned.shards)) if n not in planned.learned_shards]
        run_plan(planned, place, LocalPool(1), plain, silent)
        distill(DistillJob(plan=planned, folder=place, device=device), Alone(), PlainEngine, silent)
        files = [shard.file for shard in planned.shards if not shard.is_head]
        return {name: value for file in files for name, value in load_file(place / file).items()}
