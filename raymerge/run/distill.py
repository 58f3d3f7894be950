"""Run the learned part of a plan: in this process, or on a group of Ray Train workers under DeepSpeed ZeRO."""

import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from raymerge.checkpoint.place import OutputPath
from raymerge.checkpoint.reader import open_reader
from raymerge.checkpoint.workspace import Workspace
from raymerge.distill.engine import Alone, Group, MakeEngine, PlainEngine
from raymerge.distill.schedule import DRAFT, TAIL, Distiller
from raymerge.distill.stages import Stage
from raymerge.distill.walk import Walk
from raymerge.errors import RecipeError
from raymerge.learn.calibration import Reading, read_batches
from raymerge.methods.prodistill import Prodistill
from raymerge.models import load
from raymerge.models.trunk import Trunk
from raymerge.plan.execute import peak_bytes
from raymerge.plan.finish import output_tokenizer
from raymerge.plan.passage import FilePassage
from raymerge.plan.schema import Plan
from raymerge.plan.units import UNITS, PlanUnits, write_coefficients
from raymerge.plan.weights import PlanWeights
from raymerge.recipe.schema import Compute, Recipe
from raymerge.run.merge import Progress, silent
from raymerge.run.shared import Shared

logger = logging.getLogger("raymerge")


@dataclass(frozen=True, kw_only=True, slots=True)
class UnitProgress:
    """Where a fit is: epoch `epoch` of `epochs` of a unit, or of its draft."""

    unit: str
    epoch: int
    epochs: int
    loss: float
    relative_loss: float
    elapsed_seconds: float
    ended: bool


Tell = Callable[[UnitProgress], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class DistillJob:
    """All that a rank needs. Places must mean the same on every node."""

    plan: Plan
    folder: OutputPath
    device: str
    stage: Stage = Stage()

    @property
    def shared(self) -> Shared:
        """What every node must see."""
        return Shared(folder=self.folder, locations=self.plan.locations)


def run_distillation(plan: Plan, workspace: Workspace, recipe: Recipe, local: bool, progress: Progress) -> int:
    """Fit all units of a plan that are not finished; returns the peak memory of any rank, in bytes.

    Raises LearningError if a fit diverges, RayMergeError if workers are lost too often.
    """
    folder = workspace.folder
    with ExitStack() as stack:
        tell = _log_and_pass_on(plan, folder, progress)
        if recipe.output.tensorboard:
            tell = stack.enter_context(_to_tensorboard(workspace.staging, tell))
        peak = _run(plan, folder, recipe.compute, local, tell)
    if plan.distillation is not None and plan.distillation.keep_moved:
        write_coefficients(plan, folder)
    return peak


def _run(plan: Plan, folder: OutputPath, compute: Compute, local: bool, tell: Tell) -> int:
    job = DistillJob(plan=plan, folder=folder, device="cuda" if compute.gpus_per_worker else "cpu")
    workers = compute.workers or 1
    if workers == 1 and not compute.zero_stage and not compute.gpus_per_worker:
        with _all_cores():
            return distill(job, Alone(), PlainEngine, tell)
    if local:
        raise RecipeError("compute.workers: several workers, ZeRO and GPUs run on Ray; leave out --local")
    # Ray takes a second to import.
    from raymerge.run.stages import train_stages

    jobs = [replace(job, stage=Stage(number=n, count=compute.stages)) for n in range(compute.stages)]
    return train_stages(jobs, workers // compute.stages, compute, tell)


@contextmanager
def _to_tensorboard(folder: Path, tell: Tell) -> Iterator[Tell]:
    """Also write every loss to `raymerge/tensorboard/`, a curve per unit."""
    from tensorboardX import SummaryWriter

    with SummaryWriter(str(folder / "raymerge" / "tensorboard")) as writer:

        def tell_both(at: UnitProgress) -> None:
            writer.add_scalar(f"loss/{at.unit}", at.loss, at.epoch)
            tell(at)

        yield tell_both


def _log_and_pass_on(plan: Plan, folder: OutputPath, progress: Progress) -> Tell:
    """One line in the log per unit, and a bar that moves with every epoch."""
    begun = time.perf_counter()
    names = list(_unit_epochs(plan))
    before = [name for name in names if (folder / UNITS / f"{name}.json").is_file()]
    # In hundredths of a unit: units have different numbers of epochs, and stages work on several at once.
    done: dict[str, int] = {}
    fitted = 0

    def tell(at: UnitProgress) -> None:
        nonlocal fitted
        done[at.unit] = 100 if at.ended else 100 * at.epoch // at.epochs
        whole = 100 * len(before) + sum(done.values())
        progress(f"fitting {at.unit}: loss {at.relative_loss:.3f} of its start", whole, 100 * len(names))
        if at.ended:
            fitted += 1
            to_go = (time.perf_counter() - begun) / fitted * (len(names) - len(before) - fitted)
            logger.info(
                f"{at.unit} ({names.index(at.unit) + 1} of {len(names)}): loss {at.loss:.4g}, {at.relative_loss:.3f} "
                f"of its start, {at.elapsed_seconds:.1f} s; about {to_go:.0f} s to go"
            )

    return tell


def _unit_epochs(plan: Plan) -> dict[str, int]:
    """All fits of a plan, a unit's draft apart, with their epochs."""
    assert plan.distillation is not None
    method = plan.calls[0].build()
    assert isinstance(method, Prodistill)
    units = [unit.name for unit in plan.distillation.units]
    if not method.correction_epochs:
        return dict.fromkeys(units, method.epochs)
    drafts = {f"{unit}{DRAFT}": method.epochs for unit in units if unit != TAIL}
    return drafts | dict.fromkeys(units, method.correction_epochs)


@contextmanager
def _all_cores() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def distill(job: DistillJob, group: Group, make_engine: MakeEngine, tell: Tell) -> int:
    """One rank's part of a distillation; returns this process's peak memory in bytes."""
    plan = job.plan
    assert plan.distillation is not None
    method = plan.calls[0].build()
    assert isinstance(method, Prodistill)
    trunk = Trunk(plan.config, plan.distillation.blocks or None, job.device)
    with open_reader(plan.locations) as reader:
        weights = PlanWeights(plan, trunk, reader)
        trunk.leave_out(weights.missing)
        batches = read_batches(plan.distillation.calibrations, _reading(plan, method, trunk))
        walk = Walk(trunk, batches, group, getattr(torch, plan.distillation.precision))
        units = PlanUnits(plan, job.folder, trunk, weights, group)
        told = _Teller(plan, tell) if group.rank == 0 else None
        Distiller(
            walk,
            weights,
            units,
            method.fit_settings(plan.seed),
            make_engine,
            group,
            told or silent,
            job.stage,
            FilePassage(job.folder, job.stage, group),
        ).run()
    return peak_bytes()


class _Teller:
    """Says where a fit is, once an epoch."""

    def __init__(self, plan: Plan, tell: Tell) -> None:
        self._epochs = _unit_epochs(plan)
        self._tell = tell
        self._begun = time.perf_counter()

    def __call__(self, unit: str, losses: Sequence[float], ended: bool) -> None:
        if len(losses) == 1:
            self._begun = time.perf_counter()
        self._tell(
            UnitProgress(
                unit=unit,
                epoch=len(losses),
                epochs=self._epochs[unit],
                loss=losses[-1],
                relative_loss=losses[-1] / losses[0] if losses[0] else 1.0,
                elapsed_seconds=time.perf_counter() - self._begun,
                ended=ended,
            )
        )


def _reading(plan: Plan, method: Prodistill, trunk: Trunk) -> Reading:
    assert plan.distillation is not None
    images = any(calibration.column == "image" for calibration in plan.distillation.calibrations)
    texts = any(calibration.column in ("text", "messages") for calibration in plan.distillation.calibrations)
    return Reading(
        config=trunk.model.config,
        tokenizer=output_tokenizer(plan) if texts else None,
        image_processor=load.load_image_processor(str(plan.locations[0])) if images else None,
        samples=method.samples,
        max_length=method.max_length,
        batch_size=method.batch_size,
        seed=plan.seed,
    )
