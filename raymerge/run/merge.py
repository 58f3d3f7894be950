"""Run a plan on a pool: whole-model statistics first where the method needs them, then shard by shard."""

from collections.abc import Callable
from functools import partial
from typing import Any

from raymerge.checkpoint.header import DTYPES
from raymerge.checkpoint.place import OutputPath
from raymerge.methods.base import StatisticsMethod
from raymerge.plan.execute import ShardReport, measure_shard, merge_shard
from raymerge.plan.schema import Plan, Shard
from raymerge.run.pool import Pool

Progress = Callable[[str, int, int], None]
"""Told (what is done, how many parts are done, of how many) as a run goes on."""


def silent(*_: object) -> None:
    """Progress that nobody looks at."""


def run_plan(plan: Plan, folder: OutputPath, pool: Pool, todo: list[int], progress: Progress) -> list[ShardReport]:
    """Write the shards numbered in `todo` below `folder`; reports in the order they were finished."""
    known = statistics(plan, pool, progress) if todo else None
    reports: list[ShardReport] = []
    # The largest first, so that the last ones to finish are small.
    order = sorted(todo, key=lambda number: -num_entries_read(plan.shards[number]))
    jobs = [plan.job(number, pool.device) for number in order]
    for _, report in pool.map(partial(_merge, folder=folder, known=known), jobs):
        reports.append(report)
        progress("merging", len(plan.shards) - len(todo) + len(reports), len(plan.shards))
    return reports


def _merge(job: Any, *, folder: OutputPath, known: Any) -> ShardReport:
    return merge_shard(job, folder, known)


def _measure(job: Any, *, known: Any) -> Any:
    return measure_shard(job, known)


def num_entries_read(shard: Shard) -> int:
    """How many entries of checkpoints go into a shard."""
    return sum(tensor.num_elements * len(tensor.sources) for tensor in shard.tensors)


def statistics(plan: Plan, pool: Pool, progress: Progress) -> Any:
    """Statistics of the whole model, round by round; None if the method has none."""
    merged = next((t for shard in plan.shards for t in shard.tensors if t.call is not None), None)
    if merged is None or merged.call is None:
        return None
    method = plan.calls[merged.call].build()
    if not isinstance(method, StatisticsMethod) or method.scope != "model":
        return None
    dtype = DTYPES[merged.arithmetic]
    rounds = method.rounds(dtype)
    jobs = [plan.job(number, pool.device) for number in range(len(plan.shards))]
    known = None
    for number in range(rounds):
        parts: dict[int, Any] = {}
        for index, part in pool.map(partial(_measure, known=known), jobs):
            parts[index] = part
            progress(f"measuring, round {number + 1} of {rounds}", len(parts), len(jobs))
        # Added up in the order of shards, so that float sums do not depend on who was first.
        total = sum(parts[index] for index in sorted(parts) if parts[index] is not None)
        known = method.conclude(total, known, dtype)  # type: ignore[arg-type]
    return known
