"""Examine models that come one after the other on the same rows: what a search asks of each trial."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from raymerge.errors import LearningError, RecipeError
from raymerge.evaluate.objectives import Reference, check_objectives, value_of
from raymerge.evaluate.rounds import Prepared, Round, prepare
from raymerge.evaluate.rows import check_task, open_rows
from raymerge.models import load
from raymerge.recipe.schema import Objective, Recipe, Search, Task

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Shares of the rows after which a trial that may be stopped early says how it does.
SHARES = (0.25, 0.5, 1.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Examiner:
    """Tasks with their rows in memory, and what the experts themselves give on them."""

    tasks: tuple[Prepared, ...]
    references: Mapping[str, Reference]
    objectives: tuple[Objective, ...]
    weights: Mapping[str, float]
    shares: tuple[float, ...]

    @property
    def experts(self) -> tuple[str | None, ...]:
        """Whose heads are needed (None: a model as it is)."""
        return tuple(dict.fromkeys(prepared.task.expert for prepared in self.tasks))

    def examine(self, models: Mapping[str | None, "PreTrainedModel"]) -> Iterator[dict[str, float]]:
        """Objectives by name, and `score.<task>`, after each share of the rows, of which `share` says which."""
        rounds = {prepared.task.task: Round(models[prepared.task.expert], prepared) for prepared in self.tasks}
        for share in self.shares:
            outcomes = {task: round.until(share) for task, round in rounds.items()}
            values: dict[str, float] = {
                str(name): value_of(name, outcomes, self.references, self.weights) for name in self.objectives
            }
            broken = next((name for name, value in values.items() if math.isnan(value)), None)
            if broken is not None:
                raise LearningError(f"{broken} is not a number: the merged model's outputs overflow")
            scores = {f"score.{task}": found.score for task, found in outcomes.items()}
            yield {**values, **scores, "share": share}


def check_search(recipe: Recipe, search: Search) -> None:
    """Raise RecipeError if a search's tasks or objectives cannot be, or its rows are the test rows."""
    if not search.evaluate:
        raise RecipeError(
            "search.evaluate: missing; tasks on validation data are expected, evaluate is for the test data"
        )
    for i, task in enumerate(search.evaluate):
        if task.expert is not None and task.expert not in recipe.experts:
            raise RecipeError(f"search.evaluate.{i}.expert: no expert {task.expert!r}")
        check_task(task)
    tests = {file: task for task in recipe.evaluate for file in open_rows(task).file_hashes()}
    for task in search.evaluate:
        shared = open_rows(task).file_hashes() & tests.keys()
        if shared:
            twin = tests[min(shared)]
            raise RecipeError(
                f"search.evaluate: {task.task} reads the rows of evaluate: {twin.task}, {task.data}: a search must not "
                f"see the test data; give it other rows"
            )
    check_objectives(search, search.evaluate)


def task_hashes(recipe: Recipe) -> list[str]:
    """What identifies the rows of all tasks, those of the search first."""
    tasks = [*(recipe.search.evaluate if recipe.search else ()), *recipe.evaluate]
    return [file for task in tasks for file in sorted(open_rows(task).file_hashes())]


def make_examiner(recipe: Recipe, search: Search, tokenizer_from: str) -> Examiner:
    """Read all rows, and measure the experts on them. `tokenizer_from` is the place of the output's tokenizer.

    Raises RecipeError, CheckpointError.
    """
    tasks, references = [], {}
    for task in search.evaluate:
        network = _own_model(recipe, task)
        prepared = prepare(task, tokenizer_from, network).held(recipe.seed)
        tasks.append(prepared)
        if task.expert is not None:
            found = Round(network, prepared).until(1.0)
            references[task.task] = Reference(score=found.score, predictions=found.predictions)
    return Examiner(
        tasks=tuple(tasks),
        references=references,
        objectives=tuple(search.objective),
        weights=search.weights,
        shares=SHARES if search.stop_early else (1.0,),
    )


def _own_model(recipe: Recipe, task: Task) -> "PreTrainedModel":
    """The task's expert; without one, whatever of the recipe is of the right kind."""
    places: Sequence[str | None] = [recipe.experts[task.expert].path] if task.expert else [recipe.base]
    place = places[0] or next(iter(recipe.experts.values())).path
    return load.load_language_model(place) if task.kind == "perplexity" else load.load_classifier(place)
