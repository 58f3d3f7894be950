"""The pool of a Ray cluster: one task per item, with its CPU, GPU and memory request.

Connects to the cluster this process belongs to (RAY_ADDRESS, or one started on this machine), else starts
Ray on this machine for as long as the process lives.
"""

import logging
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Event, current_thread, main_thread
from typing import Any, TypeVar

import ray
from ray._private import ray_constants

from raymerge.errors import MemoryBudgetError, RayMergeError, RecipeError
from raymerge.run.allocator import keep_freed_chunks
from raymerge.run.nodes import Preference, look_around
from raymerge.run.shared import Shared

logger = logging.getLogger("raymerge")

Item = TypeVar("Item")
Result = TypeVar("Result")

# Tasks return small reports; tensors travel through files.
OBJECT_STORE_BYTES = 128 * 2**20


def connect() -> None:
    """Join or start Ray; does nothing if this process already has. Raises RayMergeError.

    Call it from the main thread: Ray cannot be started from another.
    """
    if current_thread() is not main_thread():
        # The main thread may be starting it.
        _ready.wait()
    if ray.is_initialized():
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        if os.environ.get("RAY_ADDRESS") or _is_on_a_cluster():
            ray.init(log_to_driver=False, logging_level=logging.ERROR)
            return
        with _on_loopback():
            ray.init(
                address="local",
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
                object_store_memory=OBJECT_STORE_BYTES,
            )
    except (ConnectionError, RuntimeError, OSError, ValueError) as problem:
        raise RayMergeError(f"Ray could not be reached or started: {problem}") from None


@contextmanager
def _on_loopback() -> Iterator[None]:
    """A Ray started within listens on loopback, not on every address of this machine: as by itself on a Mac."""
    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


def _is_on_a_cluster() -> bool:
    """`ray start` has run on this machine, and what it started still answers."""
    note = Path("/tmp/ray/ray_current_cluster")
    try:
        host, _, port = note.read_text().strip().rpartition(":")
        with socket.create_connection((host, int(port)), timeout=2):
            return True
    except (OSError, ValueError):
        return False


# Set while Ray is up and its workers have imported what they need, or while nobody is seeing to it.
_ready = Event()
_ready.set()


def run_beside_start(verb: Callable[[], Result]) -> Result:
    """Call `verb` in a thread while Ray starts in this one, the main thread.

    Until Ray's workers are there, pools work in the verb's own thread: a merge begins seconds earlier.
    """
    _ready.clear()
    # Not waited for when this thread is interrupted: then it ends with the process.
    running = ThreadPoolExecutor(1).submit(verb)
    try:
        connect()
        task = ray.remote(num_cpus=1)(_import)
        coming = [task.remote() for _ in range(os.cpu_count() or 1)]
        while not running.done() and not ray.wait(coming, timeout=0.05)[0]:
            pass
    finally:
        _ready.set()
    return running.result()


def _import() -> None:
    import raymerge.plan.execute  # noqa: F401


class RayPool:
    """Tasks on a Ray cluster, at most `workers` at once (None: as many as the cluster has room for).

    `memory_bytes` is what a task asks for, `shared` what each node must see. A killed worker's task is run again by
    Ray, on another node if its own is lost; an error raised by the function is not, it ends the run.
    """

    def __init__(
        self, workers: int | None, memory_bytes: int, gpus_per_worker: float = 0, shared: Shared | None = None
    ) -> None:
        self.device = "cuda" if gpus_per_worker else "cpu"
        self._workers = workers
        self._shared = shared
        self._preference: Preference | None = None
        self._may_begin_here = not gpus_per_worker
        self._options: dict[str, Any] = {
            "num_cpus": 1,
            "num_gpus": gpus_per_worker,
            "memory": memory_bytes,
            "max_retries": 5,
            "retry_exceptions": False,
        }

    def map(self, function: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[tuple[int, Result]]:
        waiting = list(enumerate(items))[::-1]
        while waiting and self._may_begin_here and not _ready.is_set():
            number, item = waiting.pop()
            yield number, _call(function, item, None)
        if not waiting:
            return
        _ready.wait()
        connect()
        require_room(num_cpus=1, num_gpus=self._options["num_gpus"], memory_bytes=self._options["memory"])
        if self._preference is None:
            self._preference = Preference(look_around(self._shared) if self._shared else {})
        task = ray.remote(**self._options)(_call)
        running: dict[Any, int] = {}
        most = self._workers or len(items)
        try:
            while waiting or running:
                while waiting and len(running) < most:
                    number, item = waiting.pop()
                    placed = task.options(scheduling_strategy=self._preference.strategy(item))
                    running[placed.remote(function, item, self._shared)] = number
                (done,), _ = ray.wait(list(running), num_returns=1)
                number = running.pop(done)
                yield number, result_of(done)
        finally:
            for left in running:
                ray.cancel(left, force=True)


def require_room(num_cpus: float, num_gpus: float, memory_bytes: int = 0) -> None:
    """Refuse a request that this machine can never meet, for which Ray would wait without end.

    A cluster may still grow: there it is only said that it has to.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if len(nodes) != 1 or os.environ.get("RAY_ADDRESS"):
        wanted = {"CPU": num_cpus, "GPU": num_gpus, "memory": memory_bytes}
        total = {kind: sum(node.get(kind, 0) for node in nodes) for kind in wanted}
        if any(asked > total[kind] for kind, asked in wanted.items()):
            logger.warning(f"the cluster has {total}, and {wanted} are asked for: waiting for it to grow")
        return
    room = nodes[0]
    for asked, kind, setting in ((num_gpus, "GPU", "gpus_per_worker"), (num_cpus, "CPU", "workers, cpus_per_worker")):
        if asked > room.get(kind, 0):
            raise RecipeError(
                f"compute.{setting}: {asked:g} {kind}s asked for, this machine has {room.get(kind, 0):g}; ask for less"
            )
    if memory_bytes > room.get("memory", 0):
        raise MemoryBudgetError(
            f"a worker needs {memory_bytes / 1e9:.2f} GB, Ray has {room.get('memory', 0) / 1e9:.2f} GB here; "
            f"give less with --memory, or use a larger machine"
        )


def _call(function: Callable[[Item], Result], item: Item, shared: Shared | None) -> Result:
    import torch

    if shared is not None:
        # Also on nodes that have joined since all were asked.
        shared.require_here()
    keep_freed_chunks()
    # One core per task; float sums must not depend on how many threads share them.
    torch.set_num_threads(1)
    return function(item)


def result_of(done: Any) -> Any:
    """What a task has returned; raises what it has raised, or RayMergeError if it was lost."""
    try:
        return ray.get(done)
    except ray.exceptions.RayTaskError as problem:
        cause = problem.cause
        raise (cause if isinstance(cause, Exception) else RayMergeError(str(problem))) from None
    except ray.exceptions.RayError as problem:
        raise RayMergeError(f"a worker was lost and could not be replaced: {problem}") from None
