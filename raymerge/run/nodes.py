"""The nodes of a cluster: whether each sees what it will work on, and which holds what a task reads."""

from collections.abc import Mapping
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raymerge.errors import RayMergeError
from raymerge.plan.schema import ShardJob
from raymerge.run.merge import num_entries_read
from raymerge.run.shared import InputFile, Shared

# A node that has not answered by then has no process to spare, or is lost.
PROBE_SECONDS = 120


def look_around(shared: Shared) -> dict[str, frozenset[InputFile]]:
    """What each node holds, by the node's id; empty where there is one node only.

    Raises StorageError if a node does not see what it must.
    """
    nodes = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
    if len(nodes) < 2:
        return {}
    probe = ray.remote(num_cpus=0, max_retries=0)(_probe)
    asked = {}
    for node in nodes:
        there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        asked[probe.options(scheduling_strategy=there).remote(shared)] = node
    _, silent = ray.wait(list(asked), num_returns=len(asked), timeout=PROBE_SECONDS)
    if silent:
        raise RayMergeError(f"the node {asked[silent[0]]['NodeManagerAddress']} does not answer; is it overloaded?")
    found = {}
    for answer, node in asked.items():
        try:
            found[node["NodeID"]] = ray.get(answer)
        except ray.exceptions.RayTaskError as problem:
            raise (problem.cause if isinstance(problem.cause, RayMergeError) else problem) from None
        except ray.exceptions.RayError:
            # Lost between two calls: what it would have done goes to others.
            continue
    return found


def memory_share(num_cpus: float) -> int:
    """Bytes of this node's memory that go with so many of its CPUs."""
    here = ray.get_runtime_context().get_node_id()
    room = next(node["Resources"] for node in ray.nodes() if node["NodeID"] == here)
    return int(room["memory"] * min(1, num_cpus / room["CPU"]))


def _probe(shared: Shared) -> frozenset[InputFile]:
    shared.require_here()
    return shared.held_here()


class Preference:
    """Sends what reads the same files of the hub to the same node, so that each is downloaded once in a cluster.

    Files that a node holds count for it; those that none holds go where the least has been sent.
    """

    def __init__(self, held: Mapping[str, frozenset[InputFile]]) -> None:
        self._held = {node: set(files) for node, files in held.items()}
        self._sent = dict.fromkeys(self._held, 0)

    def strategy(self, item: Any) -> Any:
        """Where a task for this item is to run, as Ray says it."""
        files = _hub_files(item) if isinstance(item, ShardJob) else frozenset()
        if not self._held or not files:
            return "SPREAD"
        node = max(self._held, key=lambda node: (len(files & self._held[node]), -self._sent[node]))
        self._held[node] |= files
        self._sent[node] += num_entries_read(item.shard)
        return NodeAffinitySchedulingStrategy(node, soft=True)


def _hub_files(job: ShardJob) -> frozenset[InputFile]:
    return frozenset(
        (str(job.locations[stored.model]), stored.file)
        for tensor in job.shard.tensors
        for source in tensor.sources
        for stored in source.tensors
        if job.locations[stored.model].is_hub
    )
