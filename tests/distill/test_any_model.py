"""Any transformer: with its coefficients left alone it is task arithmetic, and fitted it comes nearer its teachers."""

import json
from pathlib import Path

import pytest
import torch
from architectures import FAMILIES
from samples import make_any_family
from tiny import load

from raymerge import api

# One of each kind: an encoder, an image model, masks that differ by block, experts within blocks, two stacks.
QUICK = ("deberta-v2", "vit", "gemma3_text", "qwen3_moe", "t5")


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES]
)
def test_frozen_is_task_arithmetic_and_fitted_is_nearer(name: str, tmp_path: Path) -> None:
    asked = make_any_family(tmp_path, name)
    settings = {"coefficient": 0.4, "epochs": 0, "batch_size": 6, "max_length": 16}
    api.merge({**asked, "method": "prodistill", "settings": settings}, tmp_path / "frozen", local=True)
    expected = {**asked, "method": "task_arithmetic", "settings": {"coefficient": 0.4}}
    api.merge(expected, tmp_path / "expected", local=True)
    ours, theirs = load(tmp_path / "frozen"), load(tmp_path / "expected")
    assert ours.keys() == theirs.keys()
    assert all(torch.allclose(ours[key], theirs[key], atol=1e-7) for key in ours)
    settings |= {"epochs": 6, "fit_tail": True}
    api.merge({**asked, "method": "prodistill", "settings": settings}, tmp_path / "fitted", local=True)
    fitted = load(tmp_path / "fitted")
    assert fitted.keys() == ours.keys()
    units = json.loads((tmp_path / "fitted" / "raymerge" / "run.json").read_text())["units"]
    stacks = 2 if name == "t5" else 1
    assert len(units) >= 3 * stacks
    for unit in units:
        if unit["unit"] == "tail" and name == "deberta-v2":
            # What it defines after its blocks works before them.
            assert unit["losses"] == []
            continue
        assert len(unit["losses"]) == 6
        assert unit["losses"][-1] <= unit["losses"][0]
    moved = [key for key in ours if not torch.equal(ours[key], fitted[key])]
    assert len(moved) > len(ours) // 3
    assert not (tmp_path / "fitted" / "raymerge" / "units").exists()
