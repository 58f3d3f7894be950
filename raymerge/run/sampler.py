"""Optuna's samplers, and the numbers that a trial draws from them."""

import math
from collections.abc import Sequence
from typing import Any

import optuna

from raymerge import methods
from raymerge.errors import RecipeError
from raymerge.methods.base import setting_fields
from raymerge.recipe.schema import Recipe
from raymerge.recipe.space import Axis, candidates


def make_sampler(recipe: Recipe, axes: Sequence[Axis]) -> optuna.samplers.BaseSampler:
    """Optuna's sampler of a search, at its seed. Raises RecipeError if it cannot search this space."""
    assert recipe.search is not None
    search, seed = recipe.search, recipe.seed
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


def num_trials(recipe: Recipe, axes: Sequence[Axis]) -> int:
    """As many as the recipe says; a grid has as many as it has points."""
    assert recipe.search is not None
    if recipe.search.searcher != "grid":
        return recipe.search.trials
    return math.prod(len(values) for values in _grid(recipe, axes).values())


def draw(trial: optuna.Trial, axes: Sequence[Axis], method: str) -> None:
    """Draw the numbers of a trial: those of the axes that its method has, a method drawn among them or this one."""
    for axis in axes:
        if axis.setting == "method":
            method = _draw_one(trial, axis)
        elif axis.setting == "layers" or (
            axis.method in (None, method) and axis.setting in setting_fields(methods.find(method))
        ):
            _draw_one(trial, axis)


def _draw_one(trial: optuna.Trial, axis: Axis) -> Any:
    given = axis.range
    if given.choices is not None:
        return trial.suggest_categorical(axis.name, given.choices)
    assert given.low is not None and given.high is not None
    if axis.whole:
        return trial.suggest_int(axis.name, int(given.low), int(given.high), step=int(given.step or 1), log=given.log)
    return trial.suggest_float(axis.name, given.low, given.high, step=given.step, log=given.log)


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
