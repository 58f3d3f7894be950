"""The pool of a Ray cluster: one task per item, with its CPU, GPU and memory request.

Connects to the cluster this process belongs to (RAY_ADDRESS, or one started on this machine), else starts
Ray on this machine for as long as the process lives.
"""

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import ray

from raymerge.errors import MemoryBudgetError, RayMergeError, RecipeError
from raymerge.run.allocator import keep_freed_chunks

Item = TypeVar("Item")
Result = TypeVar("Result")

# Tasks return small reports; tensors travel through files.
OBJECT_STORE_BYTES = 128 * 2**20


def connect() -> None:
    """Join or start Ray; does nothing if this process already has. Raises RayMergeError.

    Call it from the main thread: Ray cannot be started from another.
    """
    if ray.is_initialized():
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        if os.environ.get("RAY_ADDRESS") or os.path.exists("/tmp/ray/ray_current_cluster"):
            try:
                ray.init(log_to_driver=False, logging_level=logging.ERROR)
                return
            except ConnectionError:
                if os.environ.get("RAY_ADDRESS"):
                    raise
        ray.init(
            address="local",
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            object_store_memory=OBJECT_STORE_BYTES,
        )
    except (ConnectionError, RuntimeError, OSError, ValueError) as problem:
        raise RayMergeError(f"Ray could not be reached or started: {problem}") from None


def warm_up() -> None:
    """Have as many workers as this machine has cores import what they need, without waiting for them."""
    task = ray.remote(num_cpus=1)(_import)
    for _ in range(os.cpu_count() or 1):
        task.remote()


def _import() -> None:
    import raymerge.plan.execute  # noqa: F401


class RayPool:
    """Tasks on a Ray cluster, at most `workers` at once (None: as many as the cluster has room for).

    `memory_bytes` is what a task asks for. A killed worker's task is run again by Ray; an error raised
    by the function is not, it ends the run.
    """

    def __init__(self, workers: int | None, memory_bytes: int, gpus_per_worker: float = 0) -> None:
        connect()
        self.device = "cuda" if gpus_per_worker else "cpu"
        _require_room(num_gpus=gpus_per_worker, memory_bytes=memory_bytes)
        self._workers = workers
        self._options = {
            "num_cpus": 1,
            "num_gpus": gpus_per_worker,
            "memory": memory_bytes,
            "max_retries": 5,
            "retry_exceptions": False,
        }

    def map(self, function: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[tuple[int, Result]]:
        task = ray.remote(**self._options)(_call)
        waiting = list(enumerate(items))[::-1]
        running: dict[Any, int] = {}
        most = self._workers or len(items)
        try:
            while waiting or running:
                while waiting and len(running) < most:
                    number, item = waiting.pop()
                    running[task.remote(function, item)] = number
                (done,), _ = ray.wait(list(running), num_returns=1)
                number = running.pop(done)
                yield number, _result(done)
        finally:
            for left in running:
                ray.cancel(left, force=True)


def _require_room(num_gpus: float, memory_bytes: int) -> None:
    """Refuse a request that this machine can never meet, for which Ray would wait without end.

    A cluster may still grow; only Ray started on one machine is asked.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if len(nodes) != 1 or os.environ.get("RAY_ADDRESS"):
        return
    room = nodes[0]
    if num_gpus > room.get("GPU", 0):
        raise RecipeError(f"compute.gpus_per_worker: {num_gpus:g} asked for, this machine has {room.get('GPU', 0):g}")
    if memory_bytes > room.get("memory", 0):
        raise MemoryBudgetError(
            f"a worker needs {memory_bytes / 1e9:.2f} GB, Ray has {room.get('memory', 0) / 1e9:.2f} GB here; "
            f"give less with --memory, or use a larger machine"
        )


def _call(function: Callable[[Item], Result], item: Item) -> Result:
    import torch

    keep_freed_chunks()
    # One core per task; float sums must not depend on how many threads share them.
    torch.set_num_threads(1)
    return function(item)


def _result(done: Any) -> Any:
    try:
        return ray.get(done)
    except ray.exceptions.RayTaskError as problem:
        cause = problem.cause
        raise (cause if isinstance(cause, Exception) else RayMergeError(str(problem))) from None
    except ray.exceptions.RayError as problem:
        raise RayMergeError(f"a worker was lost and could not be replaced: {problem}") from None
