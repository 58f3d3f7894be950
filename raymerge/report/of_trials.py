"""What a report shows of a search's trials."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from raymerge.recipe.schema import Search
from raymerge.report import plots
from raymerge.report.importance import importance
from raymerge.report.section import Section, Table


def trials_section(out: Path, facts: Mapping[str, Any]) -> Section:
    """History, Pareto front, importance of settings and all trials of a search that has these facts."""
    table = pq.read_table(out / "trials.parquet")
    trials = table.to_pylist()
    objectives = list(facts["objectives"])
    lower = Search(objective=objectives).lower
    axes = table.schema.names[1 : table.schema.names.index(objectives[0])]
    # Of a failed trial, or one that was stopped early, an objective would be of some rows only.
    seen = [trial if trial["error"] is None and trial["share_of_rows"] == 1.0 else None for trial in trials]
    whole = [trial for trial in seen if trial is not None]
    pictures = [
        plots.history(
            f"history-{name}",
            f"{name} of each trial on validation data",
            [None if trial is None else trial[name] for trial in seen],
            low,
            name,
        )
        for name, low in zip(objectives, lower, strict=True)
    ]
    if len(objectives) > 1:
        pictures.append(
            plots.front(
                "pareto",
                f"{objectives[0]} against {objectives[1]}, with the Pareto front",
                [(trial[objectives[0]], trial[objectives[1]]) for trial in whole],
                [trial["pareto"] for trial in whole],
                (objectives[0], objectives[1]),
            )
        )
    weights = importance(whole, axes, objectives[0], lower[0])
    if weights:
        pictures.append(
            plots.bars(
                "importance",
                f"Importance of each setting for {objectives[0]}",
                list(weights),
                {"importance": list(weights.values())},
                "share of the variance",
            )
        )
    best = [(name, _shown(value)) for name, value in facts["best"]["values"].items()]
    best += [(f"{name}, on validation data", _shown(value)) for name, value in facts["best"]["scores"].items()]
    tables = [Table(caption=f"The best trial, number {facts['best']['trial']}", headers=("", ""), rows=best)]
    failed = [(str(trial["trial"]), trial["error"]) for trial in trials if trial["error"] is not None]
    if failed:
        tables.append(Table(caption="Trials that failed", headers=("trial", "error"), rows=failed))
    shown = [*axes, *objectives]
    tables.append(
        Table(
            caption="All trials",
            headers=("trial", *shown, "rows seen"),
            rows=[
                (str(trial["trial"]), *(_shown(trial[name]) for name in shown), f"{trial['share_of_rows']:.0%}")
                for trial in trials
            ],
        )
    )
    text = f"{facts['num_trials']} trials by {facts['searcher']} in {facts['elapsed_seconds']:.0f} s."
    return Section(name="search", title="Search", text=[text], tables=tables, pictures=pictures)


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)
