"""A group of Ray Train workers that distils together; Ray restarts the group when one is lost."""

import os
import tempfile
from dataclasses import dataclass
from typing import Any

import psutil
import ray.train
from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend

from raymerge.distill.engine import Engine, PlainEngine
from raymerge.distill.student import Objective
from raymerge.errors import RayMergeError
from raymerge.recipe.schema import Compute
from raymerge.run.distill import DistillJob, UnitProgress, distill

MAX_FAILURES = 3


def train(job: DistillJob, workers: int, compute: Compute, box: Any, node: str | None = None) -> None:
    """Run `distill` on so many workers, all on the node of that id if one is given.

    The mailbox `box` gets the progress of rank 0, and from every rank its peak memory in bytes.

    Raises what a worker raises, or RayMergeError if workers are lost more than three times.
    """
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    gpus = compute.gpus_per_worker
    resources: dict[str, float] = {"CPU": compute.cpus_per_worker} | ({"GPU": gpus} if gpus else {})
    with tempfile.TemporaryDirectory(prefix="raymerge-train-") as storage:
        trainer = TorchTrainer(
            _train_loop,
            train_loop_config={"job": job, "compute": compute, "box": box},
            scaling_config=ScalingConfig(
                num_workers=workers,
                use_gpu=bool(gpus),
                resources_per_worker=resources,
                placement_strategy="PACK",
                label_selector={"ray.io/node-id": node} if node else None,
            ),
            torch_config=_OwnInterface(backend="nccl" if gpus else "gloo"),
            run_config=RunConfig(
                name="distill",
                storage_path=storage,
                failure_config=FailureConfig(max_failures=MAX_FAILURES),
                worker_runtime_env={"env_vars": {} if gpus else {"DS_ACCELERATOR": "cpu"}},
            ),
        )
        try:
            trainer.fit()
        except ray.train.TrainingFailedError as problem:
            raise _cause(problem) from None


class _InterfaceFirst(_TorchBackend):  # type: ignore[misc]
    """Sets up torch.distributed where gloo has been told the network interface."""

    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        worker_group.execute(_choose_interface)
        super().on_start(worker_group, backend_config)


@dataclass
class _OwnInterface(TorchConfig):  # type: ignore[misc]
    """Ray Train's own set-up, but for the network interface."""

    @property
    def backend_cls(self) -> type:
        return _InterfaceFirst


def _choose_interface() -> None:
    """Gloo listens where the machine's name leads, on many systems loopback; other nodes need the node's address."""
    address = ray.util.get_node_ip_address()
    for name, found in psutil.net_if_addrs().items():
        if any(one.address == address for one in found):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)


def _cause(problem: Exception) -> Exception:
    """The first of our own errors that a worker raised, else what Ray says."""
    for failure in getattr(problem, "worker_failures", {}).values():
        if isinstance(failure, RayMergeError):
            return failure
        cause = getattr(failure, "cause", None) or failure.__cause__
        if isinstance(cause, RayMergeError):
            return cause
    return RayMergeError(f"distillation failed: {problem}")


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
