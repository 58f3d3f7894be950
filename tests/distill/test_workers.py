"""Real groups of Ray Train workers under DeepSpeed: every stage and any number of ranks fit the same curve."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from command import listening
from samples import make_family
from tiny import load

from raymerge import api
from raymerge.errors import RecipeError
from raymerge.run.merge import Progress

pytestmark = pytest.mark.usefixtures("ray_session")


def curves(out: Path) -> list[list[float]]:
    facts = json.loads((out / "raymerge" / "run.json").read_text())
    return [unit["losses"] for unit in facts["units"]]


def compare(folder: Path, compute: dict[str, Any], progress: Progress | None = None) -> None:
    asked = make_family(folder)
    api.merge(asked, folder / "alone", local=True)
    api.merge({**asked, "compute": compute}, folder / "group", progress=progress)
    alone, group = curves(folder / "alone"), curves(folder / "group")
    assert len(alone) == len(group) == 3
    for ours, theirs in zip(group, alone, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3)
    one, many = load(folder / "alone"), load(folder / "group")
    assert one.keys() == many.keys()
    distance = max(float((one[name] - many[name]).abs().max()) for name in one)
    # A task vector's entries are about 0.02 here.
    assert distance < 2e-3


def test_two_ranks_share_what_is_learned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stage 3: trained numbers, gradients and moments are all sharded. Paths may be relative to the driver's folder."""
    monkeypatch.chdir(tmp_path)
    compare(Path(), {"workers": 2, "zero_stage": 3})


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1])
def test_every_stage(tmp_path: Path, stage: int) -> None:
    """On one machine, its ranks are reached from this machine alone."""
    found: set[str] = set()
    compare(tmp_path, {"workers": 2, "zero_stage": stage}, progress=lambda *_: found.update(listening()))
    assert found == {"127.0.0.1"}


@pytest.mark.slow
def test_stage_two_and_the_same_bits_again(tmp_path: Path) -> None:
    compute = {"workers": 2, "zero_stage": 2}
    compare(tmp_path, compute)
    api.merge({**make_family(tmp_path), "compute": compute}, tmp_path / "again")
    one, two = load(tmp_path / "group"), load(tmp_path / "again")
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_offload(tmp_path: Path, stage: int) -> None:
    compare(tmp_path, {"workers": 2, "zero_stage": stage, "offload": True})


@pytest.mark.slow
def test_four_ranks(tmp_path: Path) -> None:
    compare(tmp_path, {"workers": 4, "cpus_per_worker": 0.5, "zero_stage": 2})


def test_more_than_this_machine_has(tmp_path: Path) -> None:
    asked = {**make_family(tmp_path), "compute": {"workers": 999}}
    with pytest.raises(RecipeError, match="compute.workers, cpus_per_worker: 999 CPUs asked for"):
        api.merge(asked, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_offload_needs_something_to_shard(tmp_path: Path) -> None:
    asked = {**make_family(tmp_path), "compute": {"workers": 2, "offload": True}}
    with pytest.raises(RecipeError, match="compute.offload: .* set compute.zero_stage"):
        api.plan(asked)


def test_several_workers_need_ray(tmp_path: Path) -> None:
    asked = {**make_family(tmp_path), "compute": {"workers": 2}}
    with pytest.raises(
        RecipeError, match="compute.workers: several workers, ZeRO and GPUs run on Ray; leave out --local"
    ):
        api.merge(asked, tmp_path / "out", local=True)
