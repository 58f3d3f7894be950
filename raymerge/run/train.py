"""A group of Ray Train workers that distils together; one that loses a worker is started anew."""

import logging
import os
import socket
import tempfile
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import psutil
import ray.train
import torch.distributed as dist
from ray.train.torch import TorchConfig
from ray.train.torch.config import _set_torch_distributed_env_vars, _TorchBackend
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError, WorkerHealthCheckTimeoutError

from raymerge.distill.engine import Engine, PlainEngine
from raymerge.distill.student import Objective
from raymerge.errors import RayMergeError
from raymerge.recipe.schema import Compute
from raymerge.run.distill import DistillJob, UnitProgress, distill

logger = logging.getLogger("raymerge")

MAX_LOSSES = 3


def train(job: DistillJob, workers: int, compute: Compute, box: Any, node: str | None = None) -> None:
    """Run `distill` on so many workers, all on the node of that id if one is given.

    The mailbox `box` gets the progress of rank 0, and from every rank its peak memory in bytes. A group that loses a
    worker is started anew, and goes on from the last finished block.

    Raises the error of ours that a worker raises; RayMergeError if one fails twice in the same way, or if workers are
    lost more than three times.
    """
    before = ""
    for losses in range(1, MAX_LOSSES + 2):
        try:
            _fit(job, workers, compute, box, node)
            return
        except ray.train.TrainingFailedError as problem:
            # It would be raised again, which is why Ray Train itself is not asked to start a group anew.
            if (cause := _raised_by_us(problem)) is not None:
                raise cause from None
            errors = _errors(problem)
            if errors and errors == before:
                raise RayMergeError(f"distillation: a worker failed, twice alike: {errors}") from problem
            before = errors
            if losses > MAX_LOSSES:
                raise RayMergeError(f"distillation: workers were lost {losses} times, at last: {problem}") from None
            logger.warning(f"a worker was lost ({losses} of at most {MAX_LOSSES} times): its group is started anew")


def _fit(job: DistillJob, workers: int, compute: Compute, box: Any, node: str | None) -> None:
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    gpus = compute.gpus_per_worker
    resources: dict[str, float] = {"CPU": compute.cpus_per_worker} | ({"GPU": gpus} if gpus else {})
    with tempfile.TemporaryDirectory(prefix="raymerge-train-") as storage:
        TorchTrainer(
            _train_loop,
            train_loop_config={"job": job, "compute": compute, "box": box},
            scaling_config=ScalingConfig(
                num_workers=workers,
                use_gpu=bool(gpus),
                resources_per_worker=resources,
                placement_strategy="PACK",
                label_selector={"ray.io/node-id": node} if node else None,
            ),
            torch_config=_TorchByAddress(backend="nccl" if gpus else "gloo"),
            run_config=RunConfig(
                name="distill",
                storage_path=storage,
                worker_runtime_env={"env_vars": {} if gpus else {"DS_ACCELERATOR": "cpu"}},
            ),
        ).fit()


class _ByAddress(_TorchBackend):  # type: ignore[misc]
    """Sets up torch.distributed where it listens on the nodes' addresses and no other: on one machine, on loopback."""

    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        worker_group.execute(_set_torch_distributed_env_vars)
        worker_group.execute(_choose_interface)
        address, port = worker_group.execute_single(0, _open_store)
        join = (_join, backend_config.backend, address, port, backend_config.timeout_s)
        ray.get([worker_group.execute_single_async(rank, *join) for rank in range(len(worker_group))])


@dataclass
class _TorchByAddress(TorchConfig):  # type: ignore[misc]
    """Ray Train's own set-up, but for where it listens."""

    @property
    def backend_cls(self) -> type:
        return _ByAddress


def _choose_interface() -> None:
    """Gloo listens where the machine's name leads, on many systems loopback; other nodes need the node's address."""
    address = ray.util.get_node_ip_address()
    for name, found in psutil.net_if_addrs().items():
        if any(one.address == address for one in found):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)


# Of rank 0, where the ranks find each other; it must outlive the fit.
_stores: list[Any] = []


def _open_store() -> tuple[str, int]:
    """Open a store that listens on this node's address, where torch's own would on all; returns address and port."""
    address = ray.util.get_node_ip_address()
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    listening = socket.create_server((address, 0), family=family)
    port = listening.getsockname()[1]
    store = dist.TCPStore(  # type: ignore[attr-defined]
        address, port, is_master=True, master_listen_fd=listening.detach(), wait_for_workers=False, use_libuv=True
    )
    _stores.append(store)
    return address, port


def _join(backend: str, address: str, port: int, timeout_seconds: int) -> None:
    timeout = timedelta(seconds=timeout_seconds)
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = dist.TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=timeout)  # type: ignore[attr-defined]
    # DeepSpeed looks for these.
    os.environ |= {"MASTER_ADDR": address, "MASTER_PORT": str(port)}
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)


def _raised_by_us(problem: Exception) -> RayMergeError | None:
    """The first of our own errors that a worker raised."""
    for failure in getattr(problem, "worker_failures", {}).values():
        for cause in (failure, getattr(failure, "cause", None), failure.__cause__):
            if isinstance(cause, RayMergeError):
                return cause
    return None


def _errors(problem: Exception) -> str:
    """What the workers raised themselves; empty if one was lost, for which others then raise something too."""
    failures = getattr(problem, "worker_failures", {}).values()
    lost = WorkerHealthCheckFailedError | WorkerHealthCheckTimeoutError | ray.exceptions.RayError
    if any(isinstance(failure, lost) for failure in failures):
        return ""
    return "; ".join(sorted({str(failure).strip().splitlines()[-1] for failure in failures}))


def _train_loop(config: dict[str, Any]) -> None:
    """What every worker runs."""
    import torch

    from raymerge.run.zero import TrainGroup, ZeroEngine

    job: DistillJob = config["job"]
    compute: Compute = config["compute"]
    box = config["box"]
    # Also on nodes that have joined since all were asked.
    job.shared.require_here()
    torch.set_num_threads(max(1, int(compute.cpus_per_worker)))
    group = TrainGroup()

    def tell(progress: UnitProgress) -> None:
        box.put.remote(progress)

    def make_engine(objective: Objective, lr: float) -> Engine:
        if group.size == 1 and not compute.zero_stage:
            return PlainEngine(objective, lr)
        return ZeroEngine(objective, lr, stage=compute.zero_stage, offload=compute.offload)

    # Waits, so that everything has arrived when this worker ends.
    ray.get(box.put.remote(distill(job, group, make_engine, tell)))
