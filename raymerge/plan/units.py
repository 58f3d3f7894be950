"""The files of a distillation: finished units as shards of the output; drafts, movements and curves beside them."""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict

from torch import Tensor

from raymerge.checkpoint.header import DTYPES, layout_bytes
from raymerge.checkpoint.place import OutputPath, load_tensors, remove_tree
from raymerge.checkpoint.reader import open_reader
from raymerge.checkpoint.workspace import is_whole
from raymerge.checkpoint.writer import open_shard, write_tensors, write_text
from raymerge.distill.engine import Group
from raymerge.distill.fit import UnitFit
from raymerge.distill.schedule import DRAFT
from raymerge.distill.student import Weights
from raymerge.errors import StorageError
from raymerge.models.trunk import Trunk
from raymerge.plan.execute import merge_shard
from raymerge.plan.schema import Plan
from raymerge.plan.weights import PlanWeights

UNITS = "raymerge/units"
# Longer than any network file system keeps what it has seen of a folder.
PATIENCE_SECONDS = 180


class PlanUnits:
    """Keeps the units of a plan below an output folder that all ranks share; rank 0 writes."""

    def __init__(self, plan: Plan, folder: OutputPath, trunk: Trunk, weights: PlanWeights, group: Group) -> None:
        assert plan.distillation is not None
        self._plan = plan
        self._units = plan.distillation
        self._folder = folder
        self._trunk = trunk
        self._weights = weights
        self._group = group

    def load(self, unit: str, names: Sequence[str]) -> Weights | None:
        """The parameters of a finished unit, as they were written; None if it is not finished."""
        shards = [self._plan.shards[number] for number in self._units.unit(unit).shards]
        if not self._agreed(lambda: all(is_whole(self._folder / s.file, layout_bytes(s.layout)) for s in shards), unit):
            return None
        wanted = {tensor.name for tensor in self._weights.tensors_of(names)}
        stored: dict[str, Tensor] = {}
        for shard in shards:
            stored |= {name: value for name, value in load_tensors(self._folder / shard.file).items() if name in wanted}
        return self._weights.as_written(stored)

    def write(self, unit: str, merged: Weights, moved: Weights, found: UnitFit) -> Weights:
        """Keep a finished unit, and return its parameters as they were written."""
        names = [tensor.name for tensor in self._weights.tensors_of(list(merged))]
        fitted = self._trunk.conversion.to_checkpoint(names, {name: value.cpu() for name, value in merged.items()})
        if self._group.rank == 0:
            self._write_facts(unit, found)
            if self._units.keep_moved:
                write_tensors(self._moved_path(unit), moved)
            for number in self._units.unit(unit).shards:
                merge_shard(self._plan.job(number, "cpu"), self._folder, fitted=fitted)
        self._group.wait()
        return self._weights.as_written(fitted)

    def draft(self, unit: str) -> Weights | None:
        """What a first fit of a unit has moved; None if there was none."""
        path = self._moved_path(f"{unit}{DRAFT}")
        return load_tensors(path) if self._agreed(path.is_file, unit) else None

    def write_draft(self, unit: str, moved: Weights, found: UnitFit) -> None:
        """Keep what a first fit of a unit has moved."""
        if self._group.rank == 0:
            self._write_facts(f"{unit}{DRAFT}", found)
            write_tensors(self._moved_path(f"{unit}{DRAFT}"), moved)
        self._group.wait()

    def _agreed(self, is_there: Callable[[], bool], unit: str) -> bool:
        """What rank 0 sees, which writes. Other machines are given time to see it too: network file systems remember
        for up to a minute that a file was not there. Raises StorageError.
        """
        seen = is_there()
        if not self._group.add_up(float(seen and self._group.rank == 0)):
            return False
        end = time.monotonic() + PATIENCE_SECONDS
        while not (seen or is_there()):
            if time.monotonic() > end:
                raise StorageError(f"{self._folder}: {unit} was written by another node, and this one does not see it")
            time.sleep(1)
        return True

    def _write_facts(self, unit: str, found: UnitFit) -> None:
        write_text(self._folder / UNITS / f"{unit}.json", json.dumps(asdict(found)))

    def _moved_path(self, unit: str) -> OutputPath:
        return self._folder / UNITS / f"{unit}.safetensors"


def read_fits(folder: OutputPath, units: Sequence[str]) -> list[dict[str, object]]:
    """The curves of all units below an output folder, drafts first where there are any."""
    found = []
    for unit in units:
        for name in (f"{unit}{DRAFT}", unit):
            path = folder / UNITS / f"{name}.json"
            if path.is_file():
                found.append(json.loads(path.read_text(encoding="utf-8")))
    return found


def discard_units(folder: OutputPath) -> None:
    """Remove what only served to go on after a kill, when the facts of the run have been written."""
    remove_tree(folder / UNITS)


def write_coefficients(plan: Plan, folder: OutputPath) -> None:
    """Write `raymerge/coefficients.safetensors`: `<expert>.<parameter>` for each element, or each tensor's number."""
    assert plan.distillation is not None
    with open_reader(plan.locations) as reader:
        trunk = Trunk(plan.config, plan.distillation.blocks or None)
        _write_coefficients(plan, folder, PlanWeights(plan, trunk, reader))


def _write_coefficients(plan: Plan, folder: OutputPath, weights: PlanWeights) -> None:
    assert plan.distillation is not None
    experts = [model.name for model in plan.models if model.name != "base"]
    moved: dict[str, Tensor] = {}
    for unit in plan.distillation.units:
        moved |= load_tensors(folder / UNITS / f"{unit.name}.safetensors")
    elementwise = plan.calls[0].settings["granularity"] == "element"
    layout = [
        (f"{expert}.{name}", DTYPES["F32"], tuple(value.shape) if elementwise else ())
        for expert in experts
        for name, value in moved.items()
    ]
    with open_shard(folder / "raymerge" / "coefficients.safetensors", layout) as writer:
        for number, expert in enumerate(experts):
            for name, value in moved.items():
                start = weights.start(name, expert)
                if elementwise:
                    found = start + weights.delta(name, expert).sign() * value
                else:
                    found = start.flatten()[:1] + value[number]
                writer.write(f"{expert}.{name}", 0, found)
