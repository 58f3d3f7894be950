"""ProDistill (Xu, Li, Zhang 2025, arXiv:2502.12706): fit block after block, each on what the merged model gives it.

`progressive` is the paper's algorithm. `parallel` fits every block on its teachers' own inputs, which are known in
advance, so that blocks do not wait for each other, and may correct them by a short progressive pass: an
approximation.

A teacher's output for a block is computed once. A unit that was finished before is not fitted again.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from raymerge.distill.engine import Group, MakeEngine
from raymerge.distill.fit import Tell, UnitFit, fit
from raymerge.distill.settings import FitSettings
from raymerge.distill.student import Objective, Weights, make_student
from raymerge.distill.walk import Walk
from raymerge.models.stacks import Stack
from raymerge.models.trunk import block_parameters, output_of

TAIL = "tail"
DRAFT = ".draft"
"""Ends the name of a unit's first fit, where it is fitted twice."""


class Source(Protocol):
    """Where weights come from, float32, by their names in the trunk."""

    num_experts: int

    def initial(self, names: Sequence[str], written: bool = False) -> Weights:
        """The parameters merged with the coefficients of the start; `written`: rounded as they are stored."""
        ...

    def deltas(self, names: Sequence[str], summed: bool) -> list[Weights]:
        """The experts' task vectors; `summed`: only the sum of their absolute values."""
        ...

    def of_expert(self, expert: int, names: Sequence[str]) -> Weights:
        """The parameters of an expert."""
        ...


class Sink(Protocol):
    """Where fitted units go."""

    def load(self, unit: str, names: Sequence[str]) -> Weights | None:
        """The parameters of a unit that was finished before, as they were written; None if it was not."""
        ...

    def write(self, unit: str, merged: Weights, moved: Weights, found: UnitFit) -> Weights:
        """Keep a finished unit, and return its parameters as they were written."""
        ...

    def draft(self, unit: str) -> Weights | None:
        """What a first fit of a unit has moved; None if there was none."""
        ...

    def write_draft(self, unit: str, moved: Weights, found: UnitFit) -> None:
        """Keep what a first fit of a unit has moved."""
        ...


class Distiller:
    """One rank's part in fitting all units."""

    def __init__(
        self,
        walk: Walk,
        source: Source,
        sink: Sink,
        settings: FitSettings,
        make_engine: MakeEngine,
        group: Group,
        tell: Tell,
    ) -> None:
        self._walk = walk
        self._trunk = walk.trunk
        self._source = source
        self._sink = sink
        self._settings = settings
        self._make_engine = make_engine
        self._group = group
        self._tell = tell

    def run(self) -> None:
        """Fit every block of every stack, and the tail if the settings say so."""
        corrected = self._settings.correction_epochs
        if self._settings.schedule == "progressive":
            self._pass(self._settings.epochs)
        elif corrected == 0:
            self._pass(self._settings.epochs, on_teachers=True)
        else:
            self._pass(self._settings.epochs, on_teachers=True, draft=True)
            self._walk.begin_again()
            self._pass(corrected)

    def _pass(self, epochs: int, on_teachers: bool = False, draft: bool = False) -> None:
        for stack in self._trunk.stacks:
            self._enter(stack)
            for block in range(stack.num_blocks):
                self._block(stack, block, epochs, on_teachers, draft)
            if on_teachers:
                self._walk.follow("student", "teacher")
            self._walk.leave(stack)
        if self._settings.fit_tail and not draft:
            self._tail(epochs)

    def _enter(self, stack: Stack) -> None:
        outside = list(self._trunk.outside)
        first = block_parameters(stack, 0, self._source.initial(self._names(stack, 0)))
        self._walk.enter(stack, "student", None, self._source.initial(outside, written=True), first)
        for expert in range(self._source.num_experts):
            self._walk.enter(stack, "teacher", expert, self._source.of_expert(expert, outside), first)

    def _block(self, stack: Stack, block: int, epochs: int, on_teachers: bool, draft: bool) -> None:
        walk, unit, names = self._walk, f"{stack.name}.{block}", self._names(stack, block)
        if on_teachers:
            walk.follow("student", "teacher")
        elif self._settings.inputs == "single":
            walk.follow("teacher", "student")
        for expert in range(self._source.num_experts):
            weights = block_parameters(stack, block, self._source.of_expert(expert, names))
            walk.advance(stack, block, "teacher", expert, weights)
        merged = self._sink.load(unit, names)
        if merged is None and not (draft and self._sink.draft(unit) is not None):

            def run(weights: Weights, sample: Any) -> Tensor:
                return self._trunk.run_block(stack, block, block_parameters(stack, block, weights), *sample).hidden

            def samples(number: int) -> tuple[Any, Tensor, Tensor | None]:
                part = walk.parts[number]
                return walk.sample("student", part, block), walk.hidden("teacher", part), walk.mask(stack, part)

            merged = self._fit(unit, names, run, samples, epochs, draft)
        if not on_teachers:
            assert merged is not None
            walk.advance(stack, block, "student", None, block_parameters(stack, block, merged))

    def _tail(self, epochs: int) -> None:
        names = self._trunk.tail
        if not names or self._sink.load(TAIL, names) is not None:
            return
        walk, trunk = self._walk, self._trunk
        outside = list(trunk.outside)
        student = walk.cast(self._source.initial(outside, written=True))
        for expert in range(self._source.num_experts):
            weights = walk.cast(self._source.of_expert(expert, outside))
            for part in walk.parts:
                if part.expert == expert:
                    with torch.no_grad():
                        output = trunk.run_tail(weights, part.inputs, walk.ends("teacher", part))
                    walk.cache.put(f"target-{part.number}", output_of(output))

        def run(weights: Weights, sample: Any) -> Tensor:
            return output_of(trunk.run_tail({**student, **weights}, *sample))

        def samples(number: int) -> tuple[Any, Tensor, Tensor | None]:
            part, target = walk.parts[number], walk.cache.get(f"target-{number}")
            mask = walk.mask(trunk.stacks[-1], part) if target.ndim == 3 else part.counted
            return (part.inputs, walk.ends("student", part)), target, mask

        working = self._working(names, run, samples)
        if working:
            self._fit(TAIL, working, run, samples, epochs, draft=False)
        else:
            self._sink.write(TAIL, {}, {}, UnitFit(unit=TAIL, losses=(), elapsed_seconds=0.0))

    def _working(
        self,
        names: Sequence[str],
        run: Callable[[Weights, Any], Tensor],
        samples: Callable[[int], tuple[Any, Tensor, Tensor | None]],
    ) -> list[str]:
        """The parameters that the output depends on: some families define after the blocks what works before."""
        weights = {n: w.requires_grad_() for n, w in self._walk.cast(self._source.initial(names)).items()}
        output = run(weights, samples(0)[0])
        if not output.requires_grad:
            return []
        found = torch.autograd.grad(output.sum(), list(weights.values()), allow_unused=True)
        return [name for name, gradient in zip(weights, found, strict=True) if gradient is not None]

    def _fit(
        self,
        unit: str,
        names: Sequence[str],
        run: Callable[[Weights, Any], Tensor],
        samples: Callable[[int], tuple[Any, Tensor, Tensor | None]],
        epochs: int,
        draft: bool,
    ) -> Weights:
        settings, device = self._settings, self._trunk.device
        deltas = self._source.deltas(names, summed=settings.granularity == "element")
        student = make_student(
            settings.granularity, _on(device, self._source.initial(names)), [_on(device, delta) for delta in deltas]
        ).to(device)
        begun = self._sink.draft(unit)
        if begun is not None:
            student.move_to(begun)
        objective = Objective(student, run, self._walk.dtype)
        found = fit(
            f"{unit}{DRAFT}" if draft else unit,
            self._make_engine(objective, settings.lr),
            samples,
            len(self._walk.parts),
            epochs=epochs,
            plateau=settings.plateau,
            seed=settings.seed,
            group=self._group,
            tell=self._tell,
        )
        if draft:
            self._sink.write_draft(unit, student.moved(), found)
            return {}
        with torch.no_grad():
            return self._sink.write(unit, student(), student.moved(), found)

    def _names(self, stack: Stack, block: int) -> list[str]:
        return [f"{stack.parameter_prefix(block)}{name}" for name in self._trunk.parameters_of(stack, block)]


def _on(device: str, weights: Weights) -> dict[str, Tensor]:
    return {name: value.to(device) for name, value in weights.items()}
