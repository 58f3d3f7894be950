"""ProDistill end to end on small models: what is learned, resumed, refused, reported."""

import json
from functools import partial
from pathlib import Path
from threading import Timer
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from samples import make_family
from tiny import load, weights

from raymerge import api
from raymerge.checkpoint.workspace import Workspace
from raymerge.checkpoint.writer import write_tensors
from raymerge.errors import LearningError, MemoryBudgetError, RecipeError, StorageError
from raymerge.plan import units as units_module
from raymerge.plan.units import PlanUnits


def units_of(out: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((out / "raymerge" / "run.json").read_text())["units"]
    return found


def test_every_unit_learns_and_the_heads_stay(tmp_path: Path) -> None:
    asked = make_family(tmp_path, epochs=25)
    result = api.merge(asked, tmp_path / "out", local=True)
    units = units_of(tmp_path / "out")
    assert [unit["unit"] for unit in units] == ["encoder.layer.0", "encoder.layer.1", "tail"]
    assert all(unit["losses"][-1] < 0.99 * unit["losses"][0] for unit in units)
    assert result.peak_bytes > 0
    assert api.merge(asked, tmp_path / "out", local=True).shards_resumed == len(result.plan.shards)
    model = __import__("raymerge").load_task_model(tmp_path / "out", "b")
    assert model.config.num_labels == 3


def test_the_same_bytes_again(tmp_path: Path) -> None:
    asked = make_family(tmp_path)
    api.merge(asked, tmp_path / "one", local=True)
    api.merge(asked, tmp_path / "two", local=True)
    assert weights(tmp_path / "one") == weights(tmp_path / "two")
    api.merge({**asked, "seed": 1}, tmp_path / "three", local=True)
    assert weights(tmp_path / "one") != weights(tmp_path / "three")


@pytest.mark.parametrize("schedule", [{}, {"schedule": "parallel", "correction_epochs": 2}])
def test_stopped_after_any_unit_it_goes_on(tmp_path: Path, schedule: dict[str, Any]) -> None:
    """Bytes of an undisturbed run, wherever the run before was stopped; in bfloat16, where rounding shows."""
    asked = make_family(tmp_path, **schedule) | {"output": {"dtype": "bfloat16"}}
    api.merge(asked, tmp_path / "expected", local=True)
    assert len(units_of(tmp_path / "expected")) == (5 if schedule else 3)

    class Stopped(Exception):
        pass

    for stop in (25, 100, 150, 275):

        def progress(what: str, done: int, total: int, stop: int = stop) -> None:
            if what.startswith("fitting") and done >= stop:
                raise Stopped

        out = tmp_path / f"out{stop}"
        with pytest.raises(Stopped):
            api.merge(asked, out, local=True, progress=progress)
        assert not out.exists()
        api.merge(asked, out, local=True)
        assert weights(out) == weights(tmp_path / "expected")
        ours, theirs = units_of(out), units_of(tmp_path / "expected")
        assert [u["losses"] for u in ours] == [u["losses"] for u in theirs]


def test_what_it_goes_on_from_outlives_the_last_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = make_family(tmp_path) | {"output": {"coefficients": True}}
    api.merge(asked, tmp_path / "expected", local=True)

    def full(_: object) -> None:
        raise StorageError("no space is left")

    with monkeypatch.context() as patched, pytest.raises(StorageError, match="no space is left"):
        patched.setattr(Workspace, "publish", full)
        api.merge(asked, tmp_path / "out", local=True)
    api.merge(asked, tmp_path / "out", local=True)
    assert weights(tmp_path / "out") == weights(tmp_path / "expected")
    assert [unit["losses"] for unit in units_of(tmp_path / "out")] == [
        unit["losses"] for unit in units_of(tmp_path / "expected")
    ]
    names = [{path.relative_to(out).as_posix() for path in out.rglob("*")} for out in tmp_path.glob("[oe][ux]*")]
    assert names[0] == names[1] and "raymerge/units" not in names[0]


def test_ranks_agree_on_what_is_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0 says; another that does not see its file yet, as on a network file system, waits for it."""
    plan = api.plan(make_family(tmp_path))
    drafts = tmp_path / "out" / "raymerge" / "units"

    class Rank1:
        rank, size = 1, 2

        def __init__(self, rank0_sees: bool) -> None:
            self.rank0_sees = rank0_sees

        def add_up(self, value: float) -> float:
            return value + self.rank0_sees

        def wait(self) -> None: ...

    def units(rank0_sees: bool) -> PlanUnits:
        nothing: Any = None
        return PlanUnits(plan, tmp_path / "out", nothing, nothing, Rank1(rank0_sees))

    write = partial(write_tensors, drafts / "encoder.layer.0.draft.safetensors", {"u": torch.ones(3)})
    timer = Timer(0.5, write)
    timer.start()
    found = units(rank0_sees=True).draft("encoder.layer.0")
    timer.join()
    assert found is not None and found["u"].tolist() == [1, 1, 1]
    # A file that only this rank sees was written by nobody of this group.
    assert units(rank0_sees=False).draft("encoder.layer.0") is None
    monkeypatch.setattr(units_module, "PATIENCE_SECONDS", 0.2)
    with pytest.raises(StorageError, match=r"encoder.layer.1 was written by another node, and this one does not see"):
        units(rank0_sees=True).draft("encoder.layer.1")


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"coefficient": [0.2, 0.5]},
        {"granularity": "tensor"},
        {"granularity": "block"},
        {"schedule": "whole"},
        {"schedule": "whole", "granularity": "block"},
        {"schedule": "whole", "granularity": "task"},
    ],
    ids=str,
)
def test_coefficients_give_the_merge(tmp_path: Path, settings: dict[str, Any]) -> None:
    asked = make_family(tmp_path, **settings) | {"output": {"coefficients": True}}
    api.merge(asked, tmp_path / "out", local=True)
    found = load_file(tmp_path / "out" / "raymerge" / "coefficients.safetensors")
    merged, base = load(tmp_path / "out"), load(tmp_path / "base")
    experts = {name: load(tmp_path / name) for name in ("a", "b")}
    names = {key.partition(".")[2] for key in found}
    assert "encoder.layer.1.output.dense.weight" in names and "pooler.dense.bias" in names
    for name in names:
        expected = base[name].clone()
        for expert, tensors in experts.items():
            expected += found[f"{expert}.{name}"] * (tensors[f"bert.{name}"] - base[name])
        assert torch.allclose(merged[name], expected, atol=1e-6)
    starts = torch.tensor(settings.get("coefficient", [0.3]))
    assert any(float((value.flatten()[0] - starts).abs().min()) > 1e-3 for value in found.values())
    different = {round(float(value), 6) for key, value in found.items() if key.startswith("a.") and value.ndim == 0}
    blocks = {"block": 3, "task": 1}.get(settings.get("granularity", ""), len(different))
    assert len(different) == blocks


@pytest.mark.parametrize(
    "settings",
    [
        {"granularity": "tensor"},
        {"granularity": "block"},
        {"inputs": "single"},
        {"schedule": "parallel"},
        {"schedule": "parallel", "correction_epochs": 2},
        {"schedule": "whole", "fit_tail": False},
        {"fit_tail": False},
        {"coefficient": [0.2, 0.5]},
    ],
    ids=str,
)
def test_other_ways(tmp_path: Path, settings: dict[str, Any]) -> None:
    asked = make_family(tmp_path, **settings)
    api.merge(asked, tmp_path / "out", local=True)
    for unit in units_of(tmp_path / "out"):
        assert unit["losses"][-1] <= unit["losses"][0]
    plain = {**asked, "method": "task_arithmetic", "settings": {"coefficient": settings.get("coefficient", 0.3)}}
    api.merge(plain, tmp_path / "plain", local=True)
    ours, theirs = load(tmp_path / "out"), load(tmp_path / "plain")
    same = {name for name in ours if torch.allclose(ours[name], theirs[name], atol=1e-7)}
    assert {name for name in ours if name.startswith("embeddings.")} <= same
    assert any(name.startswith("pooler") for name in same) == (settings.get("fit_tail") is False)
    assert not any(name.endswith("output.dense.weight") for name in same)


def test_a_task_wise_coefficient_spans_all_blocks(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="settings.granularity: task spans all blocks.* set schedule: whole"):
        api.plan(make_family(tmp_path, granularity="task"))
    planned = api.plan(make_family(tmp_path, granularity="task", schedule="whole"))
    assert [unit.name for unit in planned.cost.units] == ["whole"]


def test_tensorboard_files(tmp_path: Path) -> None:
    from tensorboardX.proto.event_pb2 import Event

    asked = make_family(tmp_path) | {"output": {"tensorboard": True}}
    api.merge(asked, tmp_path / "out", local=True)
    (file,) = (tmp_path / "out" / "raymerge" / "tensorboard").iterdir()
    found: dict[str, list[float]] = {}
    data, at = file.read_bytes(), 0
    # Records: eight bytes of length, four of checksum, the event, four of checksum.
    while at < len(data):
        size = int.from_bytes(data[at : at + 8], "little")
        event = Event.FromString(data[at + 12 : at + 12 + size])
        for value in event.summary.value:
            found.setdefault(value.tag, []).append(value.simple_value)
        at += 12 + size + 4
    for unit in units_of(tmp_path / "out"):
        assert found[f"loss/{unit['unit']}"] == pytest.approx(unit["losses"], rel=1e-5)


def test_bfloat16_blocks(tmp_path: Path) -> None:
    asked = make_family(tmp_path) | {"compute": {"precision": "bfloat16"}}
    api.merge(asked, tmp_path / "out", local=True)
    assert all(unit["losses"][-1] < unit["losses"][0] for unit in units_of(tmp_path / "out"))


def test_padding_does_not_count(tmp_path: Path) -> None:
    """Samples alone in their batch, or padded to a longer one: the first loss is the same."""
    asked = make_family(tmp_path, epochs=1, lr=1e-12)
    api.merge(asked, tmp_path / "six", local=True)
    asked["settings"]["batch_size"] = 1
    api.merge(asked, tmp_path / "one", local=True)
    for ours, theirs in zip(units_of(tmp_path / "six"), units_of(tmp_path / "one"), strict=True):
        assert ours["losses"] == pytest.approx(theirs["losses"], rel=1e-4)


def test_a_plateau_ends_a_block(tmp_path: Path) -> None:
    asked = make_family(tmp_path, epochs=60, plateau=0.5)
    api.merge(asked, tmp_path / "out", local=True)
    assert all(4 <= len(unit["losses"]) < 60 for unit in units_of(tmp_path / "out"))


def test_a_fit_that_diverges_is_an_error(tmp_path: Path) -> None:
    asked = make_family(tmp_path, lr=1e30)
    with pytest.raises(LearningError, match=r"encoder.layer.0: the loss is not finite in epoch \d; lower settings.lr"):
        api.merge(asked, tmp_path / "out", local=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"calibration": None}, r"experts.a.calibration: prodistill learns from a few dozen unlabelled rows"),
        ({"calibration": "nowhere.parquet"}, r"experts.a.calibration: nowhere.parquet is not there"),
        ({"calibration": "{}/empty.parquet"}, r"experts.a.calibration: .* has no rows"),
        ({"calibration": "{}/other.parquet"}, r"has no column messages, input_ids, text, image; it has words"),
        ({"calibration": "{}/wrong.parquet"}, r"column 'text' holds int64; text is expected"),
    ],
    ids=str,
)
def test_samples_are_checked_by_the_plan(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    asked = make_family(tmp_path)
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "empty.parquet")
    pq.write_table(pa.table({"words": ["a"]}), tmp_path / "other.parquet")
    pq.write_table(pa.table({"text": [1]}), tmp_path / "wrong.parquet")
    for key, value in change.items():
        asked["experts"]["a"][key] = value.format(tmp_path) if value else value
    with pytest.raises(RecipeError, match=said):
        api.plan(asked)


def test_settings_are_one_for_all_tensors(tmp_path: Path) -> None:
    asked = make_family(tmp_path, lr=[0.1, 0.2])
    with pytest.raises(RecipeError, match="settings.lr: found 0.1 and 0.2; it is one for all tensors"):
        api.plan(asked)


def test_a_budget_is_kept_or_refused(tmp_path: Path) -> None:
    asked = make_family(tmp_path)
    planned = api.plan(asked)
    assert [unit.name for unit in planned.cost.units] == ["encoder.layer.0", "encoder.layer.1", "tail"]
    assert planned.cost.units[0].state_bytes == 16 * planned.cost.units[0].num_parameters
    with pytest.raises(MemoryBudgetError, match="encoder.layer.0: fitting .* takes .* GB per worker"):
        api.plan(asked, memory=planned.cost.peak_bytes_per_worker - 10_000_000)


def test_a_plan_of_configs_alone(tmp_path: Path) -> None:
    """The table of a 405B model's block: 3.19 B parameters, 51 GB of state, on one worker or eight."""
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16", "vocab_size": 128256}
    config |= {"hidden_size": 16384, "intermediate_size": 53248, "num_hidden_layers": 3}
    config |= {"num_attention_heads": 128, "num_key_value_heads": 8}
    for name in ("base", "a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    asked = {"base": str(tmp_path / "base"), "experts": {n: str(tmp_path / n) for n in "ab"}, "method": "prodistill"}
    alone = api.plan(asked).cost.units[1]
    shared = api.plan({**asked, "compute": {"workers": 8, "zero_stage": 3}}).cost.units[1]
    assert alone.num_parameters == pytest.approx(3.19e9, rel=0.01)
    assert alone.state_bytes == pytest.approx(51e9, rel=0.01)
    assert shared.state_bytes == pytest.approx(51e9 / 8, rel=0.01)
    assert any("no weights there" in note for note in api.plan(asked).notes)
    with pytest.raises(Exception, match="no model.safetensors"):
        api.merge(asked, tmp_path / "out", local=True)


def test_samples_of_every_kind(tmp_path: Path) -> None:
    """Token ids and texts that mean the same give the same bytes; a folder is read file by file."""
    asked = make_family(tmp_path, fit_tail=False)
    api.merge(asked, tmp_path / "texts", local=True)
    for name in ("a", "b"):
        texts = pq.read_table(tmp_path / f"{name}.parquet")["text"].to_pylist()
        ids = [[int(word[1:]) + 3 for word in text.split()] for text in texts]
        (tmp_path / f"{name}-ids").mkdir()
        for part in (0, 1):
            rows = "".join(json.dumps({"input_ids": row}) + "\n" for row in ids[11 * part : 11 * part + 11])
            (tmp_path / f"{name}-ids" / f"{part}.jsonl").write_text(rows)
        asked["experts"][name]["calibration"] = str(tmp_path / f"{name}-ids")
    api.merge(asked, tmp_path / "ids", local=True)
    one, two = load(tmp_path / "texts"), load(tmp_path / "ids")
    assert all(np.array_equal(one[name].numpy(), two[name].numpy()) for name in one)
