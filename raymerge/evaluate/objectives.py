"""What a search maximises or minimises: one number out of a trial's outcomes on all tasks.

Entropy of predictions needs no labels (AdaMerging, arXiv:2310.02575), nor does agreement with each expert on its own
inputs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from raymerge.errors import RecipeError
from raymerge.evaluate.metrics import is_better_lower, share_kept
from raymerge.evaluate.rounds import Outcome
from raymerge.recipe.schema import Objective, Search, Task


@dataclass(frozen=True, kw_only=True, slots=True)
class Reference:
    """What an expert itself gives on its own task."""

    score: float
    predictions: Mapping[int, int]


def check_objectives(search: Search, tasks: Sequence[Task]) -> None:
    """Raise RecipeError if an objective has no meaning on these tasks."""
    texts = [task.task for task in tasks if task.kind == "perplexity"]
    classes = [task.task for task in tasks if task.kind == "classification"]
    for objective in search.objective:
        where = f"search.objective: {objective}"
        if objective in ("mean_score", "weighted_score", "agreement") and texts:
            raise RecipeError(f"{where}: {texts[0]} has perplexity, which is no share of what is right")
        if objective == "perplexity" and not texts:
            raise RecipeError(f"{where}: no task has kind: perplexity")
        if objective in ("worst_share_kept", "agreement"):
            orphan = next((task.task for task in tasks if task.expert is None), None)
            if orphan is not None:
                raise RecipeError(f"{where}: search.evaluate: {orphan} names no expert to compare with")
        unknown = [name for name in search.weights if name not in classes]
        if objective == "weighted_score" and (unknown or not search.weights):
            found = f", found {unknown[0]}" if unknown else ""
            raise RecipeError(f"{where}: search.weights: numbers for some of {', '.join(classes)} are expected{found}")


def value_of(
    objective: Objective,
    outcomes: Mapping[str, Outcome],
    references: Mapping[str, Reference],
    weights: Mapping[str, float],
) -> float:
    """An objective of a trial, from its outcomes by task."""
    if objective == "worst_share_kept":
        kept = [share_kept(found.metric, found.score, references[task].score) for task, found in outcomes.items()]
        return min(share for share in kept if share is not None)
    if objective == "entropy":
        return _mean([found.entropy for found in outcomes.values()])
    if objective == "agreement":
        return _mean([_agreement(found, references[task]) for task, found in outcomes.items()])
    if objective == "weighted_score":
        given = {task: weights.get(task, 0.0) for task in outcomes}
        return sum(given[task] * found.score for task, found in outcomes.items()) / sum(given.values())
    lower = objective == "perplexity"
    return _mean([found.score for found in outcomes.values() if is_better_lower(found.metric) == lower])


def _agreement(found: Outcome, reference: Reference) -> float:
    return _mean([float(reference.predictions[row] == value) for row, value in found.predictions.items()])


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
