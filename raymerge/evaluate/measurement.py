"""What is to be measured: a model on every task of a recipe, and the experts on their own."""

from collections.abc import Sequence
from dataclasses import dataclass

from raymerge.checkpoint.index import open_checkpoint
from raymerge.checkpoint.model_folder import RECIPE
from raymerge.checkpoint.place import output_path
from raymerge.errors import RecipeError
from raymerge.evaluate.measure import Score, measure
from raymerge.evaluate.rows import check_task
from raymerge.evaluate.table import Evaluation, collect
from raymerge.models.load import has_classifier
from raymerge.recipe.schema import Recipe, Task


@dataclass(frozen=True, kw_only=True, slots=True)
class Measurement:
    """A model to measure on a task, as `measure` takes it. `of_expert`: it is the task's own expert."""

    model: str
    task: Task
    head: str | None = None
    head_from: str | None = None
    of_expert: bool = False

    def run(self) -> Score:
        return measure(self.model, self.task, head=self.head, head_from=self.head_from)


def measurements(model: str, recipe: Recipe, experts: bool) -> list[Measurement]:
    """The measurements of a model and, if asked, of the experts on their own tasks.

    Raises RecipeError if there are no tasks, or the data of one does not fit.
    """
    if not recipe.evaluate:
        raise RecipeError("evaluate: the recipe has no evaluation tasks; add some under evaluate")
    for task in recipe.evaluate:
        check_task(task)
    jobs = [_of_model(model, task, recipe) for task in recipe.evaluate]
    owned = [(task, task.expert) for task in recipe.evaluate if task.expert is not None] if experts else []
    return jobs + [Measurement(model=recipe.experts[expert].path, task=task, of_expert=True) for task, expert in owned]


def _of_model(model: str, task: Task, recipe: Recipe) -> Measurement:
    if task.expert is None:
        return Measurement(model=model, task=task)
    if (output_path(model) / RECIPE).is_file():
        return Measurement(model=model, task=task, head=task.expert)
    if task.kind == "classification" and not has_classifier(open_checkpoint(model).config):
        return Measurement(model=model, task=task, head_from=recipe.experts[task.expert].path)
    return Measurement(model=model, task=task)


def collect_scores(jobs: Sequence[Measurement], scores: Sequence[Score]) -> Evaluation:
    """The evaluation of the model from all scores, the experts' among them."""
    pairs = list(zip(jobs, scores, strict=True))
    own = {score.task: score.score for job, score in pairs if job.of_expert}
    return collect([score for job, score in pairs if not job.of_expert], own)
