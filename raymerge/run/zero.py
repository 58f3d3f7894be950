"""Ranks of a Ray Train worker group as a group, and DeepSpeed's ZeRO (arXiv:1910.02054) as the engine that fits."""

from typing import Any

import torch
import torch.distributed as dist

from raymerge.distill.student import Objective


class TrainGroup:
    """All ranks of the process group that Ray Train has set up."""

    def __init__(self) -> None:
        self.rank = dist.get_rank()
        self.size = dist.get_world_size()

    def add_up(self, value: float) -> float:
        # gloo and nccl add tensors where they live; float64 keeps sums of many samples exact enough.
        device = "cuda" if dist.get_backend() == "nccl" else "cpu"
        total = torch.tensor(value, dtype=torch.float64, device=device)
        dist.all_reduce(total)
        return float(total)

    def wait(self) -> None:
        dist.barrier()


class ZeroEngine:
    """Adam under DeepSpeed: trained numbers, gradients and moments are sharded as the stage says."""

    def __init__(self, objective: Objective, lr: float, *, stage: int, offload: bool) -> None:
        import deepspeed

        _use_gloo()
        self._size = dist.get_world_size()
        zero: dict[str, Any] = {"stage": stage}
        if offload:
            zero["offload_optimizer"] = {"device": "cpu"}
        parameters = [p for p in objective.parameters() if p.requires_grad]
        self._engine, *_ = deepspeed.initialize(
            model=objective,
            optimizer=torch.optim.Adam(parameters, lr=lr),
            config={
                "train_micro_batch_size_per_gpu": 1,
                "zero_optimization": zero,
                "zero_allow_untested_optimizer": True,
                "zero_force_ds_cpu_optimizer": False,
            },
            dist_init_required=False,
        )
        self._stage = stage

    def step(self, *inputs: Any) -> float:
        loss = self._engine(*inputs)
        # DeepSpeed averages gradients over ranks; the loss is a sum over samples.
        self._engine.backward(loss * self._size)
        self._engine.step()
        return float(loss.detach())

    def gather(self) -> None:
        """Copy the trained numbers out of their shards and take the engine off its objective."""
        import deepspeed

        objective = self._engine.module
        held = {}
        for name, parameter in objective.named_parameters():
            with deepspeed.zero.GatheredParameters([parameter], enabled=self._stage == 3):
                held[name] = parameter.detach().clone()
        self._engine.destroy()
        for name, value in held.items():
            owner, _, key = name.rpartition(".")
            module = objective.get_submodule(owner)
            module._parameters[key] = torch.nn.Parameter(value, requires_grad=False)


def _use_gloo() -> None:
    """Keep DeepSpeed from compiling its own collectives for CPUs: a process killed meanwhile leaves a lock for which
    all later ones wait without end.
    """
    from deepspeed.accelerator import get_accelerator
    from deepspeed.ops import __compatible_ops__

    builder = get_accelerator().create_op_builder("ShareMemCommBuilder")
    if builder is not None:
        __compatible_ops__[builder.NAME] = False
