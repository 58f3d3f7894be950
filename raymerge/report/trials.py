"""The trials of a search as a table: which is best, which are on the Pareto front, and the parquet file of all."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from raymerge.checkpoint.writer import replacing
from raymerge.recipe.schema import Search


def best_of(trials: Sequence[Any], asked: Search) -> Any:
    """The trial that is best in the first objective among those that saw all rows; the earliest of equal ones."""
    sign = 1 if asked.lower[0] else -1
    return min((t for t in trials if t.is_whole), key=lambda t: (sign * t.scores[asked.objective[0]], t.number))


def pareto_front(trials: Sequence[Any], asked: Search) -> set[int]:
    """Numbers of the trials that no other is at least as good as in all objectives, and better in one."""
    whole = [t for t in trials if t.is_whole]
    points = {
        t.number: tuple(
            t.scores[name] if low else -t.scores[name] for name, low in zip(asked.objective, asked.lower, strict=True)
        )
        for t in whole
    }

    def is_beaten(mine: tuple[float, ...]) -> bool:
        return any(other != mine and all(a <= b for a, b in zip(other, mine, strict=True)) for other in points.values())

    return {number for number, point in points.items() if not is_beaten(point)}


def write_trials(path: Path, trials: Sequence[Any], asked: Search) -> None:
    """One row a trial: its numbers, what it reached, times in seconds, its error. Raises StorageError."""
    front = pareto_front(trials, asked)
    axes = list(dict.fromkeys(name for trial in trials for name in trial.values))
    scores = list(dict.fromkeys(name for trial in trials for name in trial.scores))
    columns: dict[str, list[Any]] = {"trial": [trial.number for trial in trials]}
    columns |= {name: _column([trial.values.get(name) for trial in trials]) for name in axes}
    columns |= {name: [trial.scores.get(name) for trial in trials] for name in scores}
    columns |= {
        "pareto": [trial.number in front for trial in trials],
        "share_of_rows": [trial.share for trial in trials],
        "merge_seconds": [trial.merge_seconds for trial in trials],
        "evaluate_seconds": [trial.evaluate_seconds for trial in trials],
        "finished_at": [trial.finished_at for trial in trials],
        "error": [trial.error for trial in trials],
    }
    with replacing(path) as temporary:
        pq.write_table(pa.table(columns), temporary)


def _column(values: list[Any]) -> list[Any]:
    """Choices may be words and numbers in one column; a file has one type in each."""
    kinds = {type(value) for value in values if value is not None}
    return values if len(kinds) <= 1 else [None if value is None else str(value) for value in values]
