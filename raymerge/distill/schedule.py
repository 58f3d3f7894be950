"""ProDistill (Xu, Li, Zhang 2025, arXiv:2502.12706): fit block after block, each on what the merged model gives it.

`progressive` is the paper's algorithm. `parallel` fits every block on its teachers' own inputs, which are known in
advance, so that stages do not wait for each other, and may correct them by a short progressive pass: an
approximation. `whole` fits all blocks as one unit to the experts' outputs.

A teacher's output for a block is computed once. A unit that was finished before is not fitted again.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from raymerge.distill.engine import Group, MakeEngine
from raymerge.distill.fit import Tell, UnitFit, fit
from raymerge.distill.settings import FitSettings
from raymerge.distill.stages import Passage, Stage
from raymerge.distill.student import Objective, Weights, make_student
from raymerge.distill.walk import Part, Path, Walk
from raymerge.models.stacks import Stack
from raymerge.models.trunk import block_parameters, output_of

TAIL = "tail"
WHOLE = "whole"
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
        stage: Stage,
        passage: Passage,
    ) -> None:
        self._walk = walk
        self._trunk = walk.trunk
        self._source = source
        self._sink = sink
        self._settings = settings
        self._make_engine = make_engine
        self._group = group
        self._tell = tell
        self._stage = stage
        self._passage = passage

    def run(self) -> None:
        """Fit every block of this stage, and after the last one the tail if the settings say so."""
        corrected = self._settings.correction_epochs
        if self._settings.schedule == "whole":
            self._whole()
        elif self._settings.schedule == "progressive":
            self._pass(self._settings.epochs)
        elif corrected == 0:
            self._pass(self._settings.epochs, on_teachers=True)
        else:
            self._pass(self._settings.epochs, on_teachers=True, draft=True)
            self._walk.begin_again()
            self._pass(corrected)

    def _pass(self, epochs: int, on_teachers: bool = False, draft: bool = False) -> None:
        def each(stack: Stack, block: int) -> None:
            self._block(stack, block, epochs, on_teachers, draft)

        name = "draft" if draft else "fit"
        ahead: Sequence[Path] = ("teacher",) if on_teachers else ()
        if ahead and not self._stage.is_last:
            # The next stage waits for nothing but its teachers' inputs: those come before any fit.
            self._journey(name, ahead, ahead, self._advance_teachers)
            self._give(name, ahead)
            self._walk.begin_again()
        both: Sequence[Path] = ("student", "teacher")
        self._journey(name, both, ahead or both, each)
        if not self._stage.is_last:
            self._give(name, [] if ahead else both)
        elif self._settings.fit_tail and not draft:
            self._tail(epochs)

    def _journey(
        self, name: str, paths: Sequence[Path], taken: Sequence[Path], each: Callable[[Stack, int], None]
    ) -> None:
        """Do something with each block of this stage, the samples of some paths standing before it.

        `taken`: the paths that the stage before hands on; the student of the others goes where its teachers go.
        """
        arrives = not self._stage.is_first
        for stack, blocks in self._stage.runs(self._trunk.stacks):
            for path in paths:
                source: Path = path if path in taken else "teacher"
                if arrives:
                    for part in self._walk.parts:
                        self._walk.take_ends(path, part, self._passage.take(f"{name}-{source}-{part.number}"))
                self._enter(stack, path)
                if blocks.start:
                    for part in self._walk.parts:
                        self._walk.take_flow(stack, path, part, self._passage.take(f"{name}-{source}-{part.number}"))
            for block in blocks:
                each(stack, block)
            if blocks.stop == stack.num_blocks:
                self._walk.leave(stack, paths)
            arrives = False

    def _give(self, name: str, paths: Sequence[Path]) -> None:
        for path in paths:
            for part in self._walk.parts:
                self._passage.give(f"{name}-{path}-{part.number}", self._walk.state(path, part))

    def _enter(self, stack: Stack, path: Path) -> None:
        outside = list(self._trunk.outside)
        # Only to see what blocks hand on, which the path before this one has, or the stage before this one.
        known = stack.name in self._trunk.num_handed
        first = {} if known else block_parameters(stack, 0, self._source.initial(self._names(stack, 0)))
        if path == "student":
            self._walk.enter(stack, path, None, self._source.initial(outside, written=True), first)
            return
        for expert in range(self._source.num_experts):
            self._walk.enter(stack, path, expert, self._source.of_expert(expert, outside), first)

    def _block(self, stack: Stack, block: int, epochs: int, on_teachers: bool, draft: bool) -> None:
        walk, unit, names = self._walk, f"{stack.name}.{block}", self._names(stack, block)
        if on_teachers:
            walk.follow("student", "teacher")
        elif self._settings.inputs == "single":
            walk.follow("teacher", "student")
        self._advance_teachers(stack, block)
        merged = self._sink.load(unit, names)
        if merged is None and not (draft and self._sink.draft(unit) is not None):

            def run(weights: Weights, sample: Any) -> Tensor:
                return self._trunk.run_block(stack, block, block_parameters(stack, block, weights), *sample).hidden

            def samples(number: int) -> tuple[Any, Tensor, Tensor | None]:
                part = walk.parts[number]
                target = walk.hidden("teacher", part)
                return walk.sample("student", part, block), target, walk.mask(stack, part, target)

            merged = self._fit(unit, names, run, samples, epochs, draft)
        if not on_teachers:
            assert merged is not None
            walk.advance(stack, block, "student", None, block_parameters(stack, block, merged))
        elif block == stack.num_blocks - 1:
            walk.follow("student", "teacher")

    def _advance_teachers(self, stack: Stack, block: int) -> None:
        names = self._names(stack, block)
        for expert in range(self._source.num_experts):
            weights = block_parameters(stack, block, self._source.of_expert(expert, names))
            self._walk.advance(stack, block, "teacher", expert, weights)

    def _tail(self, epochs: int) -> None:
        names = self._trunk.tail
        if not names or self._sink.load(TAIL, names) is not None:
            return
        walk, trunk = self._walk, self._trunk
        outside = list(trunk.outside)
        student = walk.cast(self._source.initial(outside, written=True))
        self._keep_targets(
            outside, lambda weights, part: trunk.run_tail(weights, part.inputs, walk.ends("teacher", part))
        )

        def run(weights: Weights, part: Part) -> Tensor:
            return output_of(trunk.run_tail({**student, **weights}, part.inputs, walk.ends("student", part)))

        working = self._working(names, run)
        if working:
            self._fit(TAIL, working, run, self._outputs, epochs, draft=False)
        else:
            self._sink.write(TAIL, {}, {}, UnitFit(unit=TAIL, losses=(), elapsed_seconds=0.0))

    def _whole(self) -> None:
        trunk = self._trunk
        blocks = [n for stack in trunk.stacks for block in range(stack.num_blocks) for n in self._names(stack, block)]
        outside = list(trunk.outside)
        if self._sink.load(WHOLE, blocks) is not None:
            return
        student = self._walk.cast(self._source.initial(outside, written=True))
        self._keep_targets([*outside, *blocks], lambda weights, part: trunk.run(weights, part.inputs))

        def run(weights: Weights, part: Part) -> Tensor:
            return output_of(trunk.run({**student, **weights}, part.inputs))

        names = blocks + (trunk.tail if self._settings.fit_tail else [])
        self._fit(WHOLE, self._working(names, run), run, self._outputs, self._settings.epochs, draft=False)

    def _keep_targets(self, names: Sequence[str], output: Callable[[Weights, Part], Any]) -> None:
        """Keep what each expert gives out for its own samples."""
        for expert in range(self._source.num_experts):
            weights = self._walk.cast(self._source.of_expert(expert, names))
            for part in self._walk.parts:
                if part.expert == expert:
                    with torch.no_grad():
                        self._walk.cache.put(f"target-{part.number}", output_of(output(weights, part)))

    def _outputs(self, number: int) -> tuple[Part, Tensor, Tensor | None]:
        part, target = self._walk.parts[number], self._walk.cache.get(f"target-{number}")
        return part, target, self._walk.mask(self._trunk.stacks[-1], part, target)

    def _working(self, names: Sequence[str], run: Callable[[Weights, Part], Tensor]) -> list[str]:
        """The parameters that the output depends on: some families define after the blocks what works before."""
        weights = {n: w.requires_grad_() for n, w in self._walk.cast(self._source.initial(names)).items()}
        output = run(weights, self._walk.parts[0])
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
            settings.granularity,
            _on(device, self._source.initial(names)),
            [_on(device, delta) for delta in deltas],
            {name: self._block_of(name) for name in names},
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

    def _block_of(self, name: str) -> str:
        prefixes = (s.parameter_prefix(block) for s in self._trunk.stacks for block in range(s.num_blocks))
        return next((prefix for prefix in prefixes if name.startswith(prefix)), TAIL)

    def _names(self, stack: Stack, block: int) -> list[str]:
        return [f"{stack.parameter_prefix(block)}{name}" for name in self._trunk.parameters_of(stack, block)]


def _on(device: str, weights: Weights) -> dict[str, Tensor]:
    return {name: value.to(device) for name, value in weights.items()}
