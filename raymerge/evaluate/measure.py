"""Measure one model on one task."""

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from raymerge.evaluate.rounds import Round, prepare
from raymerge.models import heads, load

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from raymerge.recipe.schema import Task


@dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """What a model reached on a task. `metric` says what `score` is; perplexity is better when lower."""

    task: str
    metric: str
    score: float
    num_rows: int
    elapsed_seconds: float


def measure(
    model: str, task: "Task", *, head: str | None = None, head_from: str | None = None, device: str = "cpu"
) -> Score:
    """The score of a model on a task.

    `model` is a checkpoint, as a folder or hub id. `head` is the name of an expert if it is a merged
    folder, and that expert's head is to be used; `head_from` is the checkpoint of an expert if it is a base
    without a head of its own. `device` is cpu or cuda.

    Raises RecipeError if the task's data does not fit, CheckpointError if the model does not load.
    """
    assert head is None or head_from is None, "a head comes from one place"
    begun = time.perf_counter()
    network = _load(model, task, head, head_from, device)
    found = Round(network, prepare(task, model, network)).until(1.0)
    return Score(
        task=task.task,
        metric=found.metric,
        score=found.score,
        num_rows=found.num_rows,
        elapsed_seconds=time.perf_counter() - begun,
    )


def _load(model: str, task: "Task", head: str | None, head_from: str | None, device: str) -> "PreTrainedModel":
    if head is not None:
        return load.place(heads.load_task_model(model, head), device)
    if head_from is not None:
        return load.place(heads.load_with_head(model, head_from), device)
    return load.load_language_model(model, device) if task.kind == "perplexity" else load.load_classifier(model, device)
