"""The verbs. The command line and the jobs call nothing else."""

import json
import logging
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from raymerge.checkpoint.header import layout_bytes
from raymerge.checkpoint.model_folder import RECIPE
from raymerge.checkpoint.place import OutputPath, RemotePath, output_path
from raymerge.checkpoint.remote_workspace import open_remote_workspace
from raymerge.checkpoint.workspace import Workspace, is_whole, open_workspace
from raymerge.checkpoint.writer import write_text
from raymerge.errors import RecipeError, StorageError, UserError
from raymerge.plan.build import build_plan
from raymerge.plan.finish import choose_chat_template, finish_folder
from raymerge.plan.forecast import Forecast, Node
from raymerge.plan.forecast import forecast as forecast_plan
from raymerge.plan.memory import parse_bytes
from raymerge.plan.schema import Plan
from raymerge.plan.units import discard_units, read_fits
from raymerge.recipe.load import load_recipe
from raymerge.recipe.schema import Recipe, absolute_folder
from raymerge.report.facts import EVALUATION, write_facts
from raymerge.run.merge import Progress, run_plan, silent
from raymerge.run.pool import LocalPool, Pool

if TYPE_CHECKING:
    from raymerge.evaluate.measure import Score
    from raymerge.evaluate.table import Evaluation

logger = logging.getLogger("raymerge")

RecipeLike = str | Path | Mapping[str, Any] | Recipe


@dataclass(frozen=True, kw_only=True, slots=True)
class MergeResult:
    """Where a merge lies and what it took; `peak_bytes` is the largest resident memory of any worker."""

    out: OutputPath
    plan: Plan
    elapsed_seconds: float
    peak_bytes: int
    shards_resumed: int


def plan(recipe: RecipeLike, *, memory: str | int | None = None) -> Plan:
    """Check a recipe against its checkpoints' headers and say exactly what a merge would do.

    `recipe` is a path, a dict, or a loaded recipe, ours or mergekit's; `memory` (as "2GB") is the most
    a worker may hold. Checkpoints that are only a `config.json` are planned too, and said to be. Raises UserError
    of every kind.
    """
    return _plan(load_recipe(recipe).with_compute(memory=memory), weightless=True)


def _plan(loaded: Recipe, weightless: bool) -> Plan:
    planned = build_plan(loaded, weightless=weightless)
    if planned.chat_template is not None:
        choose_chat_template(planned.chat_template, planned)
    return planned


def forecast(
    planned: Plan,
    nodes: Sequence[int],
    *,
    workers_per_node: int = 8,
    disk: str | int = "2GB",
    network: str | int = "3GB",
    memory_rate: str | int = "1GB",
) -> tuple[Forecast, ...]:
    """How long merging takes on so many nodes, for each number in `nodes`; `raymerge.plan.forecast` says how.

    `disk` and `network` are bytes per second of a node, `memory_rate` what one worker moves through memory while it
    merges. Raises RecipeError for a rate that is none.
    """
    node = Node(
        workers=workers_per_node,
        disk=parse_bytes(disk, "disk"),
        network=parse_bytes(network, "network"),
        memory=parse_bytes(memory_rate, "memory_rate"),
    )
    return forecast_plan(planned, nodes, node)


def merge(
    recipe: RecipeLike,
    out: str | Path,
    *,
    local: bool = False,
    workers: int | None = None,
    memory: str | int | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> MergeResult:
    """Merge checkpoints into `out`, a folder or a prefix of object storage (`s3://`, `gs://`).

    `local` works in this process instead of on Ray; `workers` bounds the tasks at once. A killed merge is
    taken up again by the same call. Raises UserError before anything is written; NonFiniteTensor and
    StorageError while merging, in which case `out` does not exist.
    """
    begun = time.perf_counter()
    loaded = load_recipe(recipe).with_compute(memory=memory, workers=workers)
    planned = _plan(loaded, weightless=False)
    tell = progress or silent
    target = output_path(out)
    with _open(target, planned.digest, overwrite) as workspace:
        if workspace.finished:
            _discard(discard_units, workspace.out)
            return MergeResult(
                out=workspace.out,
                plan=planned,
                elapsed_seconds=time.perf_counter() - begun,
                peak_bytes=0,
                shards_resumed=len(planned.shards),
            )
        todo = [
            number
            for number, shard in enumerate(planned.shards)
            if not is_whole(workspace.folder / shard.file, layout_bytes(shard.layout))
        ]
        resumed = len(planned.shards) - len(todo)
        _check_space(planned, todo, workspace.folder)
        pool = _pool(planned, workspace.folder, loaded, local)
        plain = [number for number in todo if number not in planned.learned_shards]
        reports = run_plan(planned, workspace.folder, pool, plain, tell)
        peak = max((report.peak_bytes for report in reports), default=0)
        if planned.distillation is not None:
            from raymerge.run.distill import run_distillation

            peak = max(peak, run_distillation(planned, workspace, loaded, local, tell))
        finish_folder(planned, workspace.staging, loaded.as_written(), _name(target))
        elapsed = time.perf_counter() - begun
        write_facts(
            workspace.staging,
            planned,
            _fits(planned, workspace),
            reports,
            runner="local" if local else "ray",
            elapsed_seconds=elapsed,
            peak_bytes=peak,
            resumed=resumed,
        )
        workspace.publish()
        _discard(discard_units, workspace.out)
    return MergeResult(
        out=workspace.out, plan=planned, elapsed_seconds=elapsed, peak_bytes=peak, shards_resumed=resumed
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchResult:
    """Where a search lies: `out/best.yml`, `out/merged`, `out/trials.parquet`; `facts` is what it found.

    `facts["objectives"]` are of the best trial, on validation data; `facts["test"]` is of the merged checkpoint.
    """

    out: OutputPath
    facts: Mapping[str, Any]


def search(
    recipe: RecipeLike, out: str | Path, *, overwrite: bool = False, progress: Progress | None = None
) -> SearchResult:
    """Search a recipe's space on Ray Tune, merge the best of it, and measure that once on the test data.

    A killed search is taken up again by the same call. Raises UserError before anything is written; RayMergeError if
    no trial comes to its end.
    """
    # Ray Tune and scikit-learn take seconds to import.
    from raymerge.evaluate.examiner import check_search, make_examiner, task_hashes
    from raymerge.recipe.space import axes, first_recipes, trial_recipe
    from raymerge.report.page import write_report
    from raymerge.report.search import read_search, search_digest, write_search
    from raymerge.report.trials import best_of, write_trials
    from raymerge.run.journal import discard_journal
    from raymerge.run.sampler import make_sampler
    from raymerge.run.search import SearchJob, run_search
    from raymerge.run.shared import Shared

    begun = time.perf_counter()
    loaded = load_recipe(recipe).anchored()
    if loaded.search is None:
        raise RecipeError("search: missing; say what is searched, at least the tasks under search.evaluate")
    asked, found = loaded.search, axes(loaded)
    check_search(loaded, asked)
    plans = [_plan(one, weightless=False) for one in first_recipes(loaded, found)]
    planned = plans[0]
    # Says what it cannot search before anything is written.
    make_sampler(loaded, found)
    target = output_path(out)
    with _open(target, search_digest(plans, loaded, task_hashes(loaded)), overwrite) as workspace:
        if workspace.finished:
            _discard(discard_journal, workspace.out)
            return SearchResult(out=workspace.out, facts=read_search(workspace.out))
        examiner = make_examiner(loaded, asked, str(planned.locations[planned.tokenizer.model]))
        shared = Shared(folder=None, locations=planned.locations)
        job = SearchJob(recipe=loaded, search=asked, axes=found, examiner=examiner, shared=shared)
        trials = run_search(job, workspace.folder, progress or silent)
        best = best_of(trials, asked)
        chosen = trial_recipe(loaded, found, best.values)
        merged = merge(chosen, str(workspace.folder / "merged"), overwrite=True, progress=progress).out
        test = _measure_all(merged, chosen) if chosen.evaluate else None
        write_trials(workspace.staging / "trials.parquet", trials, asked)
        write_text(workspace.staging / "best.yml", yaml.safe_dump(chosen.as_written(), sort_keys=False))
        write_search(
            workspace.staging,
            asked=asked,
            best=best,
            trials=trials,
            elapsed_seconds=time.perf_counter() - begun,
            test=test,
        )
        if isinstance(merged, RemotePath):
            merged.copy_small(workspace.staging / "merged")
        write_report(workspace.staging, workspace.out.name)
        workspace.publish()
        _discard(discard_journal, workspace.out)
    return SearchResult(out=workspace.out, facts=read_search(workspace.out))


def evaluate(
    model: str | Path,
    recipe: RecipeLike,
    *,
    experts: bool = False,
    workers: int | None = None,
    progress: Progress | None = None,
) -> "Evaluation":
    """Measure a merged folder, or any checkpoint, on the recipe's evaluation tasks.

    `experts` measures each expert on its own tasks too, for the share of its score that is kept. With
    `workers` above 1 the tasks run on Ray, one each. A checkpoint without a classifier is measured with the
    task's expert's head. Raises RecipeError, CheckpointError.
    """
    # Tables and scikit-learn are for evaluation only; merges start faster without.
    from raymerge.evaluate.measurement import Measurement, collect_scores, measurements

    # Workers stand in another folder.
    jobs = measurements(absolute_folder(str(model)), load_recipe(recipe).anchored(), experts)
    results: Iterable[tuple[int, Score]] = enumerate(job.run() for job in jobs)
    if workers is not None and workers > 1:
        from raymerge.run.cluster import RayPool

        results = RayPool(workers, memory_bytes=0).map(Measurement.run, jobs)
    scores = {}
    for number, score in results:
        scores[number] = score
        if progress is not None:
            progress("evaluating", len(scores), len(jobs))
    return collect_scores(jobs, [scores[number] for number in range(len(jobs))])


def report(out: str | Path, *, measure: bool = True) -> OutputPath:
    """Write `report.html` into the output of a merge or a search; returns its path.

    `measure` has the recipe's evaluation tasks measured first, on the merged model, the experts and the base, where
    that was not done before. On object storage it shows no coefficients, which are as large as the experts.
    Raises RayMergeError if `out` is no output.
    """
    from raymerge.report.page import PICTURES, write_report

    place = output_path(out)
    if measure:
        _measure_if_missing(place)
    if isinstance(place, RemotePath):
        with tempfile.TemporaryDirectory(prefix="raymerge-") as kept:
            place.copy_small(Path(kept))
            write_report(Path(kept), place.name)
            for path in (Path(kept, "report.html"), *Path(kept, PICTURES).iterdir()):
                (place / path.relative_to(kept).as_posix()).write_bytes(path.read_bytes())
        return place / "report.html"
    return write_report(place, place.absolute().name)


def _measure_if_missing(out: OutputPath) -> None:
    """Measure an output's merged model on its recipe's tasks, if there are any and that was not done."""
    merged = out / "merged" if (out / "merged" / RECIPE).is_file() else out
    if not (merged / RECIPE).is_file() or (merged / EVALUATION).is_file():
        return
    recipe = load_recipe(yaml.safe_load((merged / RECIPE).read_text(encoding="utf-8")))
    if recipe.evaluate:
        try:
            _measure_all(merged, recipe)
        except (UserError, StorageError) as problem:
            logger.warning(f"scores are not in the report: {problem}")


def _measure_all(merged: OutputPath, recipe: Recipe) -> dict[str, Any]:
    """Measure a merged model, the base and the experts on their tasks, and keep the scores beside the model."""
    found = evaluate(str(merged), recipe, experts=True)
    base = evaluate(recipe.base, recipe).tasks if recipe.base is not None else {}
    tasks = {
        name: {
            "metric": one.metric,
            "score": one.score,
            "share_kept": one.share_kept,
            "expert": one.expert_score,
            "base": base[name].score if name in base else None,
        }
        for name, one in found.tasks.items()
    }
    measured = {"tasks": tasks, "mean": found.mean}
    write_text(merged / EVALUATION, json.dumps(measured, indent=2) + "\n")
    return measured


def _open(out: OutputPath, digest: str, overwrite: bool) -> AbstractContextManager[Workspace]:
    if isinstance(out, RemotePath):
        return open_remote_workspace(out, digest, overwrite)
    return open_workspace(out, digest, overwrite)


def _discard(discard: Callable[[OutputPath], None], out: OutputPath) -> None:
    """Remove from an output what only served to go on after a kill."""
    try:
        discard(out)
    except StorageError as problem:
        logger.warning(f"{out}: is whole; what is no longer needed there could not be removed: {problem}")


def _name(out: OutputPath) -> str:
    return out.name if isinstance(out, RemotePath) else out.absolute().name


def _fits(planned: Plan, workspace: Workspace) -> list[dict[str, object]]:
    if planned.distillation is None:
        return []
    return read_fits(workspace.folder, [unit.name for unit in planned.distillation.units])


def _pool(planned: Plan, folder: OutputPath, recipe: Recipe, local: bool) -> Pool:
    compute = recipe.compute
    if local:
        if compute.gpus_per_worker:
            raise RecipeError("compute.gpus_per_worker: GPUs are requested through Ray; leave out --local")
        return LocalPool(compute.workers)
    # Ray takes a second to import; local merges do without.
    from raymerge.run.cluster import RayPool
    from raymerge.run.shared import Shared

    shared = Shared(folder=folder, locations=planned.locations)
    return RayPool(compute.workers, planned.cost.peak_bytes_per_worker, compute.gpus_per_worker, shared)


def _check_space(planned: Plan, todo: list[int], folder: OutputPath) -> None:
    if isinstance(folder, RemotePath):
        return
    needed = sum(layout_bytes(planned.shards[number].layout) for number in todo)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise StorageError(f"{folder}: {needed / 1e9:.2f} GB are to be written, {free / 1e9:.2f} GB are free")
