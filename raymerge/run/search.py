"""Ray Tune over the space of a recipe: ASHA stops what is bad, actors keep what trials share."""

import math
import os
import socket
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Protocol

import torch
from ray import tune
from ray.tune.search import ConcurrencyLimiter

from raymerge.checkpoint.place import OutputPath
from raymerge.errors import CheckpointError, RayMergeError, StorageError
from raymerge.recipe.schema import Recipe, Search
from raymerge.recipe.space import Axis, trial_recipe
from raymerge.run.cluster import connect
from raymerge.run.journal import Journal, Trial, discard_journal
from raymerge.run.merge import Progress
from raymerge.run.nodes import look_around, memory_share
from raymerge.run.shared import Shared
from raymerge.run.suggest import FAULT, PROBLEM, Suggester
from raymerge.run.trial import Bench

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Examiner(Protocol):
    """Says how good models are."""

    @property
    def experts(self) -> Sequence[str | None]: ...

    def examine(self, models: Mapping[str | None, "PreTrainedModel"]) -> Iterator[dict[str, float]]: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchJob:
    """All that a trial needs beside its own numbers."""

    recipe: Recipe
    search: Search
    axes: tuple[Axis, ...]
    examiner: Examiner
    shared: Shared


def run_search(job: SearchJob, folder: OutputPath, progress: Progress) -> list[Trial]:
    """All trials of a search, in the order they were begun; goes on with those that lie below `folder` already.

    After a kill, only trials that were running are begun again, with the numbers they had; early stopping compares with
    trials since then. Raises RayMergeError if the search was stopped, or no trial came to its end; StorageError if a
    node cannot read or write; OutputError if it cannot go on.
    """
    connect()
    look_around(job.shared)
    journal = Journal(folder)
    suggester = Suggester(job.recipe, job.axes, journal, progress)
    # Trials that lost their process are ended for Tune, and are left for another round.
    while left := suggester.num_open:
        before = suggester.num_ended
        _fit(job, suggester, left)
        if suggester.fault is not None:
            raise StorageError(f"search: {suggester.fault}; the same command goes on from there")
        if suggester.num_ended - before < left:
            raise RayMergeError(
                f"search: stopped with {suggester.num_open} trials left; the same command goes on from there"
            )
    found = suggester.trials
    if not any(trial.is_whole for trial in found):
        # Nothing that is worth going on from.
        discard_journal(folder)
        raise RayMergeError(f"search: no trial came to its end; the first said: {found[0].error}")
    return found


def _fit(job: SearchJob, suggester: Suggester, count: int) -> None:
    """Let Tune run so many trials. What it keeps of them is of no use: after a kill its files may be of two moments."""
    # Ray's newer output prints a banner whatever it is told; nobody would read its logs of each trial.
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    search = job.search
    resources = {"CPU": search.cpus_per_trial, "GPU": job.recipe.compute.gpus_per_worker}
    scheduler = tune.schedulers.ASHAScheduler(
        time_attr="percent",
        metric=search.objective[0],
        mode="min" if search.lower[0] else "max",
        max_t=100,
        grace_period=25,
        reduction_factor=2,
    )
    with tempfile.TemporaryDirectory(prefix="raymerge-tune-") as place:
        tune.Tuner(
            tune.with_resources(tune.with_parameters(_trial, job=job), resources),
            tune_config=tune.TuneConfig(
                search_alg=ConcurrencyLimiter(suggester, search.concurrent) if search.concurrent else suggester,
                scheduler=scheduler if search.stop_early else None,
                num_samples=count,
                reuse_actors=True,
                trial_name_creator=lambda trial: trial.trial_id,
                trial_dirname_creator=lambda trial: trial.trial_id,
            ),
            run_config=tune.RunConfig(storage_path=place, verbose=0),
        ).fit()


@lru_cache(maxsize=1)
def _bench(device: str, num_cpus: float) -> Bench:
    """What the trials of this process share."""
    return Bench(device, memory_share(num_cpus))


def _trial(config: dict[str, Any], job: SearchJob) -> None:
    """One trial, in an actor that has done others."""
    try:
        _examine(config, job)
    except Exception as problem:
        # It would fail again, unlike one whose process or node was lost, or whose node has no room, or does not see the
        # checkpoints that were there when the search was planned.
        kind = FAULT if isinstance(problem, StorageError | CheckpointError) else PROBLEM
        said = f"{socket.gethostname()}: {problem}" if kind == FAULT else _last_line(problem)
        nothing = {str(name): math.nan for name in job.search.objective}
        tune.report({**nothing, kind: said, "percent": 100})


def _examine(config: dict[str, Any], job: SearchJob) -> None:
    # Also on nodes that have joined since all were asked.
    job.shared.require_here()
    torch.set_num_threads(max(1, int(job.search.cpus_per_trial)))
    recipe = trial_recipe(job.recipe, job.axes, config)
    bench = _bench("cuda" if recipe.compute.gpus_per_worker else "cpu", job.search.cpus_per_trial)
    models, merge_seconds = bench.merge(recipe, job.examiner.experts)
    evaluating = time.perf_counter()
    for found in job.examiner.examine(models):
        tune.report(
            {
                **found,
                "percent": round(100 * found["share"]),
                "merge_seconds": merge_seconds,
                "evaluate_seconds": time.perf_counter() - evaluating,
                "finished_at": time.time(),
            }
        )


def _last_line(problem: Exception) -> str:
    said = str(problem).strip().splitlines()
    return said[-1] if said else type(problem).__name__
