"""The scores of one model on all tasks, and the share of each expert's own score that it keeps."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from raymerge.evaluate.measure import Score
from raymerge.evaluate.metrics import share_kept

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskResult:
    """A score on a task. `expert_score` is the expert's own, `share_kept` what the model keeps of it, or None."""

    score: float
    metric: str
    share_kept: float | None = None
    expert_score: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """A model's results by task, in recipe order, and the mean of the scores."""

    tasks: Mapping[str, TaskResult]
    mean: float

    def to_json(self) -> str:
        """`{"tasks": {"trec": {"score": 0.91, "metric": "accuracy", "share_kept": 0.97}}, "mean": 0.88}`."""
        tasks = {
            name: {"score": found.score, "metric": found.metric, "share_kept": found.share_kept}
            for name, found in self.tasks.items()
        }
        return json.dumps({"tasks": tasks, "mean": self.mean}, indent=2)

    def to_table(self) -> "Table":
        """A Rich table, one row a task."""
        from rich.table import Table

        table = Table("task", "metric", "score", "expert's own", "share kept")
        for name, found in self.tasks.items():
            kept = "" if found.share_kept is None else f"{found.share_kept:.1%}"
            own = "" if found.expert_score is None else f"{found.expert_score:.4f}"
            table.add_row(name, found.metric, f"{found.score:.4f}", own, kept)
        table.add_section()
        table.add_row("mean", "", f"{self.mean:.4f}", "", "")
        return table


def collect(scores: Iterable[Score], expert_scores: Mapping[str, float]) -> Evaluation:
    """Put the scores of a model together; `expert_scores` has, by task, what its expert reaches itself."""
    tasks = {
        found.task: TaskResult(
            score=found.score,
            metric=found.metric,
            share_kept=share_kept(found.metric, found.score, expert_scores.get(found.task)),
            expert_score=expert_scores.get(found.task),
        )
        for found in scores
    }
    assert tasks, "an evaluation has at least one task"
    return Evaluation(tasks=tasks, mean=sum(found.score for found in tasks.values()) / len(tasks))
