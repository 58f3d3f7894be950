"""Groups of Ray Train workers, one for each stage, on nodes of their own where there are several."""

from collections.abc import Sequence
from typing import Any

import ray
from ray.util.placement_group import placement_group, placement_group_table, remove_placement_group

from raymerge.recipe.schema import Compute
from raymerge.run.cluster import connect, require_room, result_of
from raymerge.run.distill import DistillJob, Tell, UnitProgress
from raymerge.run.mailbox import open_mailbox
from raymerge.run.nodes import look_around
from raymerge.run.train import train

# Whether groups fit on single nodes shows at once; a cluster that has to grow for them may take longer.
PLACEMENT_SECONDS = 30
# Between two looks whether a stage's node is still there.
LOOK_SECONDS = 5


def train_stages(jobs: Sequence[DistillJob], workers: int, compute: Compute, tell: Tell) -> int:
    """Run one job per stage, on so many workers each; returns the peak memory of any of them, in bytes.

    The first that fails ends all. Raises what a worker raises, or RayMergeError if workers are lost too often.
    """
    connect()
    peaks = [0]

    def receive(letter: UnitProgress | int) -> None:
        if isinstance(letter, int):
            peaks.append(letter)
        else:
            tell(letter)

    look_around(jobs[0].shared)
    with open_mailbox(receive) as box:
        _train_all(jobs, workers, compute, box)
    return max(peaks)


def _train_all(jobs: Sequence[DistillJob], workers: int, compute: Compute, box: Any) -> None:
    cpus, gpus = workers * compute.cpus_per_worker, workers * compute.gpus_per_worker
    require_room(num_cpus=len(jobs) * cpus, num_gpus=len(jobs) * gpus)
    if len(jobs) == 1:
        train(jobs[0], workers, compute, box)
        return
    nodes = _spread({"CPU": cpus, "GPU": gpus}, len(jobs))
    # Waits for its group only, and ends with it when it is cancelled.
    task = ray.remote(num_cpus=0, max_retries=0)(train)
    running = {task.remote(jobs[stage], workers, compute, box, node): stage for stage, node in enumerate(nodes)}
    try:
        while running:
            for done in ray.wait(list(running), num_returns=1, timeout=LOOK_SECONDS)[0]:
                del running[done]
                result_of(done)
            alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
            for lost, stage in list(running.items()):
                if nodes[stage] is not None and nodes[stage] not in alive:
                    # Ray would wait for this very node; elsewhere the stage goes on from its last finished block.
                    ray.cancel(lost, force=True)
                    del running[lost]
                    nodes[stage] = None
                    running[task.remote(jobs[stage], workers, compute, box)] = stage
    finally:
        for left in running:
            ray.cancel(left, force=True)


def _spread(needed: dict[str, float], count: int) -> list[str | None]:
    """The ids of nodes with room for a group each, different ones if possible; None: wherever Ray finds room."""
    if len([node for node in ray.nodes() if node["Alive"]]) == 1:
        return [None] * count
    bundle: dict[str, Any] = {kind: amount for kind, amount in needed.items() if amount}
    reserved = placement_group([bundle] * count, strategy="SPREAD")
    try:
        if not reserved.wait(PLACEMENT_SECONDS):
            return [None] * count
        found = placement_group_table(reserved)["bundles_to_node_id"]
        return [found[number] for number in range(count)]
    finally:
        remove_placement_group(reserved)
