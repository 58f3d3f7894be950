"""Blocks split over stages, which hand the samples on through files, give the bytes of one stage."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from command import python
from safetensors.torch import load_file
from samples import make_any_family, make_family
from tiny import load

from raymerge import api
from raymerge.distill.engine import Alone, PlainEngine
from raymerge.distill.stages import Stage
from raymerge.errors import RecipeError
from raymerge.models.stacks import Stack
from raymerge.plan.units import UNITS
from raymerge.run.distill import DistillJob, distill

TWO_NODES = """
import json
from pathlib import Path

import ray
from ray._private import state
from ray.cluster_utils import Cluster

from raymerge import api

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
cluster.add_node(num_cpus=1)
cluster.wait_for_nodes()
ray.init(address=cluster.address, log_to_driver=False)
api.merge(json.loads(Path("recipe.yml").read_text()), "out")
workers = [actor for actor in state.actors().values() if actor["ActorClassName"].startswith("RayTrainWorker")]
print(len({worker["Address"]["NodeID"] for worker in workers}), "nodes")
"""

SCHEDULES: list[dict[str, Any]] = [
    {},
    {"inputs": "single"},
    {"schedule": "parallel"},
    {"schedule": "parallel", "correction_epochs": 2},
]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize(("name", "count"), [("t5", 2), ("t5", 3), ("gemma3_text", 3)])
def test_stages_one_after_the_other(name: str, count: int, schedule: dict[str, Any], tmp_path: Path) -> None:
    """Encoder and decoder, whose blocks hand on position biases, cut within a stack and between the two."""
    settings = {"epochs": 3, "batch_size": 6, "max_length": 16, "fit_tail": True, **schedule}
    planned = api.plan({**make_any_family(tmp_path, name), "method": "prodistill", "settings": settings})

    def fitted(stages: int) -> dict[str, torch.Tensor]:
        folder = tmp_path / f"{stages}"
        for number in range(stages):
            stage = Stage(number=number, count=stages)
            job = DistillJob(plan=planned, folder=folder, device="cpu", stage=stage)
            distill(job, Alone(), PlainEngine, lambda _: None)
        files = sorted(folder.glob("*.safetensors"))
        return {name: value for file in files for name, value in load_file(file).items()}

    one, many = fitted(1), fitted(count)
    assert one.keys() == many.keys() and len(one) > 10
    assert all(torch.equal(one[key], many[key]) for key in one)
    assert any((tmp_path / f"{count}" / UNITS).glob("stage-*.safetensors"))


def test_every_block_has_one_stage() -> None:
    stacks = [Stack(name="encoder", num_blocks=3), Stack(name="decoder", num_blocks=5)]
    for count in range(1, 9):
        runs = [Stage(number=number, count=count).runs(stacks) for number in range(count)]
        assert all(runs)
        every = [(stack.name, block) for run in runs for stack, blocks in run for block in blocks]
        assert every == [(stack.name, block) for stack in stacks for block in range(stack.num_blocks)]
        sizes = [sum(len(blocks) for _, blocks in run) for run in runs]
        assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize(
    ("compute", "said"),
    [
        ({"workers": 3, "stages": 3}, "compute.stages: found 3; there are 2 blocks"),
        ({"workers": 3, "stages": 2}, "compute.stages: found 2, which does not divide compute.workers: 3"),
        ({"stages": 2}, "compute.stages: found 2, which does not divide compute.workers: 1"),
    ],
)
def test_stages_that_do_not_come_out(compute: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=said):
        api.plan({**make_family(tmp_path), "compute": compute})


@pytest.mark.usefixtures("ray_session")
@pytest.mark.parametrize("schedule", [{}, SCHEDULES[3]], ids=str)
@pytest.mark.slow
def test_stages_at_once(schedule: dict[str, Any], tmp_path: Path) -> None:
    """Two groups of real Ray Train workers."""
    asked = make_family(tmp_path, **schedule)
    api.merge(asked, tmp_path / "alone", local=True)
    api.merge({**asked, "compute": {"workers": 2, "stages": 2}}, tmp_path / "staged")
    one, many = load(tmp_path / "alone"), load(tmp_path / "staged")
    assert all(torch.allclose(one[name], many[name], atol=2e-3) for name in one)
    facts = [json.loads((tmp_path / out / "raymerge" / "run.json").read_text())["units"] for out in ("alone", "staged")]
    for ours, theirs in zip(*facts, strict=True):
        assert ours["losses"] == pytest.approx(theirs["losses"], rel=1e-3)


@pytest.mark.slow
def test_stages_lie_on_different_nodes(tmp_path: Path) -> None:
    asked = {**make_family(tmp_path), "compute": {"workers": 2, "stages": 2}}
    (tmp_path / "recipe.yml").write_text(json.dumps(asked))
    found = python(TWO_NODES, cwd=tmp_path)
    assert found.returncode == 0, found.stderr
    # Ray warns there too.
    assert "2 nodes" in found.stdout.splitlines()
