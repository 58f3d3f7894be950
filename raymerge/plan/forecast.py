"""Predict how long merging takes on some nodes, from the rates of their disks, network and workers.

What lies in folders is on the disk of a single node; for several nodes it is on storage that they share over the
network and that serves each of them at the disk's rate. Object storage is read over the network alone. Reading,
writing and arithmetic overlap, so the slowest of the three decides. Files are handed out the largest first: to nodes,
and on each node to its workers. Starting up, and waiting for each other between rounds of statistics, is left out.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from heapq import heapreplace
from typing import Literal

from raymerge.checkpoint.header import DTYPES
from raymerge.methods.base import StatisticsMethod, TensorMethod
from raymerge.plan.schema import Plan, PlannedTensor, Shard

Resource = Literal["disk", "network", "memory"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Node:
    """What every node has: workers; bytes per second, in both directions together, that its disk and its network move;
    and bytes per second that one worker moves through memory while it merges.
    """

    workers: int
    disk: int
    network: int
    memory: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Forecast:
    """What merging takes on `num_nodes` nodes. Files, bytes and seconds are of the node that takes longest.

    `num_busy` of all workers have a file to merge; `left_out` says what the seconds are not of.
    """

    num_nodes: int
    node: Node
    num_busy: int
    num_shards: int
    bytes_read: int
    bytes_written: int
    seconds: Mapping[Resource, float]
    peak_bytes_per_worker: int
    left_out: tuple[str, ...]

    @property
    def minutes(self) -> float:
        return max(self.seconds.values()) / 60

    @property
    def bound(self) -> Resource:
        """What takes longest."""
        return max(self.seconds, key=lambda resource: self.seconds[resource])


@dataclass(frozen=True, kw_only=True, slots=True)
class _Work:
    """What one file takes, in bytes; `remote` are those read from object storage, `moved` those moved in memory."""

    read: int
    remote: int
    written: int
    moved: int


def num_passes(tensor: PlannedTensor, method: TensorMethod | None) -> int:
    """How often the inputs of a tensor are gone through: for each round of statistics, and to merge."""
    return 1 + (method.rounds(DTYPES[tensor.arithmetic]) if isinstance(method, StatisticsMethod) else 0)


def num_reads(tensor: PlannedTensor, method: TensorMethod | None) -> int:
    """How often the inputs of a tensor are read: once if they are held between passes."""
    return 1 if tensor.held else num_passes(tensor, method)


def forecast(plan: Plan, num_nodes: Sequence[int], node: Node) -> tuple[Forecast, ...]:
    """What merging takes on so many nodes, for each number. What is learned is left out, and said to be."""
    methods = [call.build() for call in plan.calls]
    remote = {model.name for model in plan.models if model.location.is_remote}
    learned = plan.learned_shards
    works = [_work(shard, methods, remote) for number, shard in enumerate(plan.shards) if number not in learned]
    left_out = _left_out(plan, methods)
    return tuple(_on_nodes(works, count, node, plan.cost.peak_bytes_per_worker, left_out) for count in num_nodes)


def _work(shard: Shard, methods: Sequence[TensorMethod], remote: Collection[str]) -> _Work:
    read = from_remote = written = moved = 0
    for tensor in shard.tensors:
        method = None if tensor.call is None else methods[tensor.call]
        size, width = tensor.num_elements, DTYPES[tensor.arithmetic].itemsize
        stored = {source.name: size * DTYPES[source.tensors[0].dtype].itemsize for source in tensor.sources}
        reads, here = num_reads(tensor, method), size * DTYPES[tensor.dtype].itemsize
        read += reads * sum(stored.values())
        from_remote += reads * sum(count for name, count in stored.items() if name in remote)
        written += here
        # In every pass inputs come in as they are stored, and are widened.
        moved += num_passes(tensor, method) * (sum(stored.values()) + size * width * len(stored)) + here
    return _Work(read=read, remote=from_remote, written=written, moved=moved)


def _on_nodes(
    works: Sequence[_Work], num_nodes: int, node: Node, peak_bytes: int, left_out: tuple[str, ...]
) -> Forecast:
    shares = _hand_out(works, num_nodes)
    num_busy = sum(min(len(share), node.workers) for share in shares)
    found = []
    for share in shares:
        read, written = sum(work.read for work in share), sum(work.written for work in share)
        remote = sum(work.remote for work in share)
        slowest = max(sum(work.moved for work in own) for own in _hand_out(share, node.workers))
        found.append(
            Forecast(
                num_nodes=num_nodes,
                node=node,
                num_busy=num_busy,
                num_shards=len(share),
                bytes_read=read,
                bytes_written=written,
                seconds={
                    "disk": (read - remote + written) / node.disk,
                    "network": (remote if num_nodes == 1 else read + written) / node.network,
                    "memory": slowest / node.memory,
                },
                peak_bytes_per_worker=peak_bytes,
                left_out=left_out,
            )
        )
    return max(found, key=lambda one: one.minutes)


def _hand_out(works: Sequence[_Work], count: int) -> list[list[_Work]]:
    """Shares of the work: the largest first, each to the one that has least."""
    shares: list[list[_Work]] = [[] for _ in range(count)]
    loads = [(0, number) for number in range(count)]
    for work in sorted(works, key=lambda work: -work.moved):
        load, number = loads[0]
        shares[number].append(work)
        heapreplace(loads, (load + work.moved, number))
    return shares


def _left_out(plan: Plan, methods: Sequence[TensorMethod]) -> tuple[str, ...]:
    found = []
    if plan.learned_shards:
        found.append(f"fitting, and the {len(plan.learned_shards)} files of what is fitted")
    if not all(method.elementwise for method in methods):
        found.append(f"the decompositions of whole matrices that {plan.method} makes")
    return tuple(found)
