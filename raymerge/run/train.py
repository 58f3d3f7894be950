"""A group of Ray Train workers that distils together; Ray restarts the group when one is lost."""

import tempfile
from pathlib import Path
from typing import Any

from raymerge.errors import RayMergeError
from raymerge.recipe.schema import Compute
from raymerge.run.cluster import connect, require_room
from raymerge.run.distill import EVENTS, DistillJob, UnitProgress, distill, write_event

MAX_FAILURES = 3


def train(job: DistillJob, workers: int, compute: Compute) -> int:
    """Run `distill` on so many workers; returns the peak memory of any of them, in bytes.

    Raises what a worker raises, or RayMergeError if workers are lost more than three times.
    """
    connect()
    import ray.train
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    gpus = compute.gpus_per_worker
    resources: dict[str, float] = {"CPU": compute.cpus_per_worker} | ({"GPU": gpus} if gpus else {})
    require_room(num_cpus=workers * compute.cpus_per_worker, num_gpus=workers * gpus)
    with tempfile.TemporaryDirectory(prefix="raymerge-train-") as storage:
        trainer = TorchTrainer(
            _train_loop,
            train_loop_config={"job": job, "compute": compute},
            scaling_config=ScalingConfig(
                num_workers=workers,
                use_gpu=bool(gpus),
                resources_per_worker=resources,
                placement_strategy="PACK",
            ),
            torch_config=TorchConfig(backend="nccl" if gpus else "gloo"),
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
    return max((int(path.read_text()) for path in _peaks(job.folder)), default=0)


def _cause(problem: Exception) -> Exception:
    """The first of our own errors that a worker raised, else what Ray says."""
    for failure in getattr(problem, "worker_failures", {}).values():
        if isinstance(failure, RayMergeError):
            return failure
        cause = getattr(failure, "cause", None) or failure.__cause__
        if isinstance(cause, RayMergeError):
            return cause
    return RayMergeError(f"distillation failed: {problem}")


def _peaks(folder: Path) -> list[Path]:
    return list((folder / EVENTS).parent.glob("rank-*.peak"))


def _train_loop(config: dict[str, Any]) -> None:
    """What every worker runs."""
    import torch

    from raymerge.run.zero import TrainGroup, ZeroEngine

    job: DistillJob = config["job"]
    compute: Compute = config["compute"]
    torch.set_num_threads(max(1, int(compute.cpus_per_worker)))
    group = TrainGroup()

    def tell(progress: UnitProgress) -> None:
        write_event(job.folder / EVENTS, progress)

    peak = distill(
        job,
        group,
        lambda objective, lr: ZeroEngine(objective, lr, stage=compute.zero_stage, offload=compute.offload),
        tell,
    )
    (job.folder / EVENTS).with_name(f"rank-{group.rank}.peak").write_text(str(peak))
