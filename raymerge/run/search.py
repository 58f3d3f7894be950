"""Ray Tune over the space of a recipe: Optuna's samplers suggest, ASHA stops, actors keep what trials share."""

import logging
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any, Protocol

import optuna
import torch
from ray import tune
from ray.tune.search import ConcurrencyLimiter
from ray.tune.search.optuna import OptunaSearch

from raymerge.checkpoint.place import OutputPath, RemotePath, remove_tree
from raymerge.checkpoint.remote import open_filesystem
from raymerge.errors import RayMergeError, RecipeError
from raymerge.recipe.schema import Recipe, Search
from raymerge.recipe.space import Axis, candidates, trial_recipe
from raymerge.run.cluster import connect
from raymerge.run.merge import Progress
from raymerge.run.nodes import look_around
from raymerge.run.shared import Shared
from raymerge.run.trial import Bench

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger("raymerge")

EXPERIMENT = "tune"
NUMBER = "number of the trial"
PROBLEM = "problem"
# How often a trial is begun again because its process or node was lost.
MAX_LOSSES = 3


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


@dataclass(frozen=True, kw_only=True, slots=True)
class Trial:
    """One trial: its numbers by axis, what it reached, or the error that ended it.

    `share` is of the rows it has seen: below 1 where it was stopped early. `finished_at` is in seconds since 1970.
    """

    number: int
    values: Mapping[str, Any]
    scores: Mapping[str, float]
    share: float
    merge_seconds: float
    evaluate_seconds: float
    finished_at: float
    error: str | None = None

    @property
    def is_whole(self) -> bool:
        """It has seen all rows."""
        return self.error is None and self.share == 1.0


def run_search(job: SearchJob, folder: OutputPath, progress: Progress) -> list[Trial]:
    """All trials of a search, in the order they were begun; goes on with those that lie below `folder` already.

    After a kill the trials of the last seconds are lost: Tune keeps its state every ten. Raises RayMergeError if the
    search was stopped, or no trial came to its end.
    """
    search = job.search
    _reporting.clear()
    _reporting.append(progress)
    # Ray's newer output prints a banner whatever it is told.
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    connect()
    look_around(job.shared)
    storage = folder / EXPERIMENT
    trainable = tune.with_resources(
        tune.with_parameters(_trial, job=job), {"CPU": search.cpus_per_trial, "GPU": job.recipe.compute.gpus_per_worker}
    )
    filesystem, path = _tune_storage(storage)
    restore = partial(tune.Tuner.restore, path, trainable, resume_errored=True, storage_filesystem=filesystem)
    if _has_begun(storage) and tune.Tuner.can_restore(path, storage_filesystem=filesystem):
        grid = restore().fit()
    else:
        discard_experiment(folder)
        grid = _new_tuner(trainable, job, storage).fit()
    for _ in range(MAX_LOSSES):
        if not grid.num_errors:
            break
        # A process that is lost on its way from one trial to the next takes that one with it, whatever Tune is told.
        grid = restore().fit()
    found = _trials(grid, job)
    total = _num_trials(job)
    ended = [trial for trial in found if trial.error is not None or trial.share > 0]
    if len(ended) < total:
        raise RayMergeError(
            f"search: stopped after {len(ended)} of {total} trials; the same command goes on from there"
        )
    if not any(trial.is_whole for trial in found):
        # Nothing that is worth going on from.
        discard_experiment(folder)
        raise RayMergeError(f"search: no trial came to its end; the first said: {found[0].error}")
    return found


# Whom the callbacks of a search tell; they are pickled with it, and a bar on a terminal cannot be.
_reporting: list[Progress] = []


def check_searcher(recipe: Recipe, axes: Sequence[Axis]) -> None:
    """Raise RecipeError if the searcher cannot search this space."""
    assert recipe.search is not None
    _sampler(recipe, recipe.search, axes)


def _tune_storage(storage: OutputPath) -> tuple[Any, str]:
    """File system and path as Tune takes them."""
    return open_filesystem(str(storage)) if isinstance(storage, RemotePath) else (None, str(storage.absolute()))


def _has_begun(storage: OutputPath) -> bool:
    names = storage.files() if isinstance(storage, RemotePath) else [path.name for path in storage.glob("*")]
    return any(name.startswith("experiment_state-") for name in names)


def _new_tuner(trainable: Any, job: SearchJob, storage: OutputPath) -> tune.Tuner:
    filesystem, path = _tune_storage(storage)
    search = job.search
    modes = ["min" if lower else "max" for lower in search.lower]
    many = len(modes) > 1
    names: list[str] = [*search.objective]
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    suggest: Any = OptunaSearch(
        space=Suggest(job.axes, job.recipe.method),
        metric=names if many else names[0],
        mode=modes if many else modes[0],
        sampler=_sampler(job.recipe, search, job.axes),
    )
    if search.concurrent:
        suggest = ConcurrencyLimiter(suggest, max_concurrent=search.concurrent)
    scheduler = (
        tune.schedulers.ASHAScheduler(
            time_attr="percent", metric=names[0], mode=modes[0], max_t=100, grace_period=25, reduction_factor=2
        )
        if search.stop_early
        else None
    )
    return tune.Tuner(
        trainable,
        tune_config=tune.TuneConfig(
            search_alg=suggest,
            scheduler=scheduler,
            num_samples=_num_trials(job),
            reuse_actors=True,
            trial_name_creator=lambda trial: trial.trial_id,
            trial_dirname_creator=lambda trial: trial.trial_id,
        ),
        run_config=tune.RunConfig(
            name=EXPERIMENT,
            storage_path=path.removesuffix(f"/{EXPERIMENT}"),
            storage_filesystem=filesystem,
            failure_config=tune.FailureConfig(max_failures=MAX_LOSSES),
            callbacks=[_Teller(_num_trials(job), names[0])],
            verbose=0,
        ),
    )


def discard_experiment(folder: OutputPath) -> None:
    """Remove what only served to go on after a kill."""
    remove_tree(folder / EXPERIMENT)


class Suggest:
    """Draws the numbers of a trial from an Optuna trial: only those that its method has."""

    def __init__(self, axes: Sequence[Axis], method: str) -> None:
        self._axes = tuple(axes)
        self._method = method

    def __call__(self, trial: Any) -> dict[str, int]:
        """Draw; also returns the number of the trial, which survives that Tune orders them otherwise."""
        from raymerge import methods
        from raymerge.methods.base import setting_fields

        method = self._method
        for axis in self._axes:
            if axis.setting == "method":
                method = self._draw(trial, axis)
            elif axis.setting == "layers" or (
                axis.method in (None, method) and axis.setting in setting_fields(methods.find(method))
            ):
                self._draw(trial, axis)
        return {NUMBER: trial.number}

    @staticmethod
    def _draw(trial: Any, axis: Axis) -> Any:
        given = axis.range
        if given.choices is not None:
            return trial.suggest_categorical(axis.name, given.choices)
        assert given.low is not None and given.high is not None
        if axis.whole:
            return trial.suggest_int(
                axis.name, int(given.low), int(given.high), step=int(given.step or 1), log=given.log
            )
        return trial.suggest_float(axis.name, given.low, given.high, step=given.step, log=given.log)


def _sampler(recipe: Recipe, search: Search, axes: Sequence[Axis]) -> Any:
    seed = recipe.seed
    if len(search.objective) > 1 and search.searcher not in ("nsga2", "tpe", "random", "grid"):
        raise RecipeError(f"search.searcher: {search.searcher} has one objective; nsga2 or tpe takes several")
    if len(search.objective) > 1 and search.stop_early:
        raise RecipeError("search.stop_early: trials with several objectives cannot be compared half-way; leave it out")
    if search.searcher == "grid":
        return optuna.samplers.GridSampler(_grid(recipe, axes), seed=seed)
    if search.searcher == "cmaes":
        return optuna.samplers.CmaEsSampler(seed=seed, warn_independent_sampling=False)
    return {
        "tpe": optuna.samplers.TPESampler,
        "random": optuna.samplers.RandomSampler,
        "nsga2": optuna.samplers.NSGAIISampler,
    }[search.searcher](seed=seed)


def _grid(recipe: Recipe, axes: Sequence[Axis]) -> dict[str, list[Any]]:
    if len(candidates(recipe)) > 1:
        raise RecipeError("search.searcher: a grid has the same settings everywhere; search one method, or use tpe")
    found: dict[str, list[Any]] = {}
    for axis in axes:
        given = axis.range
        if given.choices is not None:
            found[axis.name] = list(given.choices)
        elif given.step is None:
            raise RecipeError(f"search.space.{axis.name}.step: a grid needs it")
        else:
            assert given.low is not None and given.high is not None
            count = int((given.high - given.low) / given.step + 1e-9) + 1
            found[axis.name] = [given.low + i * given.step for i in range(count)]
    return found


def _num_trials(job: SearchJob) -> int:
    """As many as the recipe says; a grid has as many as it has points."""
    if job.search.searcher != "grid":
        return job.search.trials
    return math.prod(len(values) for values in _grid(job.recipe, job.axes).values())


class _Teller(tune.Callback):  # type: ignore[misc]
    """Says how far a search is, and what each trial reached."""

    def __init__(self, total: int, objective: str) -> None:
        self._total = total
        self._objective = objective

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        found = trial.last_result or {}
        if PROBLEM in found:
            self.on_trial_error(iteration, trials, trial)
            return
        value = found.get(self._objective, math.nan)
        logger.info(f"{self._moved(trials, trial)}: {self._objective} {value:.4f}, {_shown(trial.config)}")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        logger.warning(f"{self._moved(trials, trial)} failed: {_shown(trial.config)}")

    def _moved(self, trials: list[Any], trial: Any) -> str:
        done = sum(one.is_finished() or one is trial for one in trials)
        for progress in _reporting:
            progress("searching", done, self._total)
        return f"trial {done} of {self._total}"


def _shown(values: Mapping[str, Any]) -> str:
    shown = {name: f"{value:.3g}" if isinstance(value, float) else value for name, value in values.items()}
    return ", ".join(f"{name} {value}" for name, value in shown.items() if name != NUMBER)


@lru_cache(maxsize=1)
def _bench(device: str) -> Bench:
    """What the trials of this process share."""
    return Bench(device)


def _trial(config: dict[str, Any], job: SearchJob) -> None:
    """One trial, in an actor that has done others."""
    try:
        _examine(config, job)
    except Exception as problem:
        # It would fail again, unlike a trial whose process or node was lost: that one Tune begins anew.
        nothing = {str(name): math.nan for name in job.search.objective}
        tune.report({**nothing, PROBLEM: _last_line(problem), "percent": 100})


def _examine(config: dict[str, Any], job: SearchJob) -> None:
    torch.set_num_threads(max(1, int(job.search.cpus_per_trial)))
    recipe = trial_recipe(job.recipe, job.axes, config)
    models, merge_seconds = _bench("cuda" if recipe.compute.gpus_per_worker else "cpu").merge(
        recipe, job.examiner.experts
    )
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


def _trials(grid: Any, job: SearchJob) -> list[Trial]:
    found = []
    for result in grid:
        values = dict(result.config or {})
        metrics = result.metrics or {}
        problem = metrics.get(PROBLEM) if result.error is None else _last_line(result.error)
        named = {name: metrics[name] for name in metrics if name in job.search.objective or name.startswith("score.")}
        found.append(
            Trial(
                # Lost again and again before it said anything: not even which one it was.
                number=values.pop(NUMBER, -1),
                values=values,
                scores={} if problem else named,
                share=metrics.get("share", 0.0),
                merge_seconds=metrics.get("merge_seconds", 0.0),
                evaluate_seconds=metrics.get("evaluate_seconds", 0.0),
                finished_at=metrics.get("finished_at", 0.0),
                error=problem,
            )
        )
    return sorted(found, key=lambda trial: trial.number)


def _last_line(problem: Exception) -> str:
    said = str(problem).strip().splitlines()
    return said[-1] if said else type(problem).__name__
