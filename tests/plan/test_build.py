"""Everything that can be wrong between a recipe and its checkpoints is found when the plan is made."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from command import python
from tiny import load, make_bert, make_llama, recipe, save

from raymerge import api
from raymerge.errors import (
    CheckpointError,
    MemoryBudgetError,
    MismatchError,
    MissingTensor,
    RecipeError,
    ShapeMismatch,
)
from raymerge.plan import memory
from raymerge.plan.schema import Plan, PlannedTensor


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("family")
    make_llama(folder / "base")
    make_llama(folder / "math", 1)
    make_llama(folder / "code", 2, files=3)
    make_bert(folder / "bert")
    make_bert(folder / "two", 1, with_head=2)
    make_bert(folder / "three", 2, with_head=3)
    make_bert(folder / "other-two", 3, with_head=2)
    return folder


def tensors(planned: Plan) -> dict[str, PlannedTensor]:
    return {tensor.name: tensor for shard in planned.shards for tensor in shard.tensors if "heads" not in shard.file}


def heads(planned: Plan) -> dict[str, list[str]]:
    return {
        shard.file.split("/")[2]: sorted(tensor.name for tensor in shard.tensors)
        for shard in planned.shards
        if shard.file.startswith("raymerge/heads/")
    }


# -- tensors that are missing, of other shapes, or not numbers to merge


def test_a_missing_tensor_has_a_policy(tmp_path: Path, family: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    make_llama(tmp_path / "poor", 3, drop=[name])
    ask = recipe(family / "base", tmp_path / "poor", family / "math", method="task_arithmetic")
    with pytest.raises(MissingTensor, match=rf"{name}: missing in 'poor'; set output.missing: base .* or skip"):
        api.plan(ask)
    skipped = api.plan({**ask, "output": {"missing": "skip"}})
    assert [source.name for source in tensors(skipped)[name].experts] == ["math"]
    filled = api.plan({**ask, "output": {"missing": "base"}})
    assert [(source.name, source.tensors[0].model) for source in tensors(filled)[name].experts] == [
        ("poor", 0),
        ("math", 2),
    ]
    for planned, policy in ((skipped, "skip"), (filled, "base")):
        assert any(f"{name}: missing in poor; {policy}" in note for note in planned.notes)


def test_missing_policies_in_numbers(tmp_path: Path, family: Path) -> None:
    name = "model.norm.weight"
    make_llama(tmp_path / "poor", 3, drop=[name])
    ask = recipe(family / "base", tmp_path / "poor", family / "math", method="linear")
    base, math = load(family / "base")[name], load(family / "math")[name]
    api.merge({**ask, "output": {"missing": "skip"}}, tmp_path / "skip", local=True)
    torch.testing.assert_close(load(tmp_path / "skip")[name], math)
    api.merge({**ask, "output": {"missing": "base"}}, tmp_path / "fill", local=True)
    torch.testing.assert_close(load(tmp_path / "fill")[name], (base + math) / 2)


def test_a_tensor_no_expert_has(tmp_path: Path, family: Path) -> None:
    for i in (1, 2):
        make_llama(tmp_path / f"poor{i}", i, drop=["lm_head.weight", "model.norm.weight"])
    ask = recipe(family / "base", tmp_path / "poor1", tmp_path / "poor2")
    with pytest.raises(MissingTensor, match=r"model.norm.weight: missing in 'poor1', 'poor2'"):
        api.plan(ask)
    planned = api.plan({**ask, "output": {"missing": "skip"}})
    assert tensors(planned)["model.norm.weight"].call is None
    assert "copied from the base, no expert has it: lm_head.weight" in planned.notes


def test_missing_without_a_base(tmp_path: Path, family: Path) -> None:
    make_llama(tmp_path / "poor", 3, drop=["model.norm.weight"])
    ask = recipe(None, family / "math", tmp_path / "poor", output={"missing": "base"})
    with pytest.raises(MissingTensor, match="there is no base to take it from"):
        api.plan(ask)


def test_shapes_that_differ_in_the_trunk(tmp_path: Path, family: Path) -> None:
    wide = {"model.layers.0.mlp.up_proj.weight": torch.zeros(40, 16)}
    make_llama(tmp_path / "wide", 1, extra=wide)
    with pytest.raises(
        ShapeMismatch, match=r"model.layers.0.mlp.up_proj.weight: 'base' has \(32, 16\), 'wide' has \(40, 16\)"
    ):
        api.plan(recipe(family / "base", tmp_path / "wide"))


def test_more_blocks_than_the_base(tmp_path: Path, family: Path) -> None:
    make_llama(tmp_path / "deep", 1, blocks=3)
    with pytest.raises(MismatchError, match=r"model.layers.2.*'deep' has it, 'base' has 2 blocks under model.layers"):
        api.plan(recipe(family / "base", tmp_path / "deep"))


def test_fewer_blocks_than_the_base(tmp_path: Path, family: Path) -> None:
    make_llama(tmp_path / "flat", 1, blocks=1)
    with pytest.raises(MissingTensor, match=r"model.layers.1.*missing in 'flat'"):
        api.plan(recipe(family / "base", tmp_path / "flat"))


def test_integers_and_flags_are_copied(tmp_path: Path) -> None:
    for i, name in enumerate(("base", "a", "b")):
        save(
            tmp_path / name,
            {
                "w": torch.full((3,), float(i)),
                "position_ids": torch.arange(4) + i,
                "mask": torch.tensor([i == 0, True]),
            },
        )
    ask = recipe(tmp_path / "base", tmp_path / "a", tmp_path / "b", output={"dtype": "bfloat16"})
    planned = api.plan(ask)
    assert "copied from 'base', not merged (not floating point): position_ids" in planned.notes
    api.merge(ask, tmp_path / "out", local=True)
    found = load(tmp_path / "out")
    assert torch.equal(found["position_ids"], torch.arange(4))
    assert torch.equal(found["mask"], torch.tensor([True, True]))
    assert found["w"].dtype == torch.bfloat16 and found["w"].tolist() == [1.5] * 3


def test_integers_in_one_model_and_floats_in_another(tmp_path: Path) -> None:
    save(tmp_path / "a", {"w": torch.zeros(3)})
    save(tmp_path / "b", {"w": torch.zeros(3, dtype=torch.int32)})
    with pytest.raises(MismatchError, match="w: integers in one model, floats in another"):
        api.plan(recipe(None, tmp_path / "a", tmp_path / "b"))


# -- heads


def test_a_headless_base_meets_experts_with_heads(family: Path, tmp_path: Path) -> None:
    ask = recipe(family / "bert", family / "two", family / "three", method="task_arithmetic")
    planned = api.plan(ask)
    assert set(tensors(planned)) == set(load(family / "bert"))
    assert heads(planned) == {name: ["classifier.bias", "classifier.weight"] for name in ("two", "three")}
    assert "kept per expert, not merged: classifier (raymerge/heads/)" in planned.notes
    stored = tensors(planned)["pooler.dense.weight"]
    assert [source.tensors[0].name for source in stored.sources] == [
        "pooler.dense.weight",
        "bert.pooler.dense.weight",
        "bert.pooler.dense.weight",
    ]
    api.merge({**ask, "settings": {"coefficient": 0.5}}, tmp_path / "out", local=True)
    base, two, three = (load(family / name) for name in ("bert", "two", "three"))
    for name, found in load(tmp_path / "out").items():
        mean = (two[f"bert.{name}"] + three[f"bert.{name}"]) / 2
        torch.testing.assert_close(found, mean, msg=name)
        assert not torch.equal(found, base[name])
    kept = load(tmp_path / "out" / "raymerge" / "heads" / "three")
    assert torch.equal(kept["classifier.weight"], three["classifier.weight"])
    config = json.loads((tmp_path / "out" / "raymerge" / "heads" / "three" / "config.json").read_text())
    assert config["architectures"] == ["BertForSequenceClassification"] and len(config["id2label"]) == 3


def test_a_base_with_a_head_meets_headless_experts(family: Path, tmp_path: Path) -> None:
    make_bert(tmp_path / "plain", 4)
    planned = api.plan(recipe(family / "two", tmp_path / "plain"))
    found = tensors(planned)
    assert found["bert.pooler.dense.weight"].experts[0].tensors[0].name == "pooler.dense.weight"
    assert found["classifier.weight"].call is None
    assert "copied from the base, no expert has it: classifier.weight" in planned.notes


def test_heads_of_different_shapes_are_kept_per_expert(family: Path) -> None:
    planned = api.plan(recipe(family / "other-two", family / "two", family / "three"))
    # The bias follows its matrix, and an expert whose head would fit keeps its own too.
    assert heads(planned) == {name: ["classifier.bias", "classifier.weight"] for name in ("two", "three")}
    assert tensors(planned)["classifier.weight"].call is None
    assert "copied from the base: classifier.weight" in planned.notes


def test_a_tensor_of_a_head_that_fits_goes_with_its_module(family: Path, tmp_path: Path) -> None:
    """`classifier.scale` has the same shape everywhere, but belongs to a head that does not fit."""
    for name, labels in (("a", 2), ("b", 3)):
        save(
            tmp_path / name,
            {**load(make_bert(tmp_path / f"{name}-made", 1, with_head=labels)), "classifier.scale": torch.ones(1)},
            json.loads((tmp_path / f"{name}-made" / "config.json").read_text()),
        )
    planned = api.plan(recipe(None, tmp_path / "a", tmp_path / "b"))
    assert heads(planned) == {name: ["classifier.bias", "classifier.scale", "classifier.weight"] for name in ("a", "b")}
    assert not any(name.startswith("classifier") for name in tensors(planned))


def test_heads_may_be_kept_though_they_fit(family: Path) -> None:
    ask = recipe(family / "other-two", family / "two")
    assert heads(api.plan(ask)) == {}
    assert tensors(api.plan(ask))["classifier.weight"].call is not None
    asked = api.plan({**ask, "output": {"heads": ["classifier"]}})
    assert heads(asked) == {"two": ["classifier.bias", "classifier.weight"]}
    with pytest.raises(RecipeError, match="output.heads: no model has a module clasifier"):
        api.plan({**ask, "output": {"heads": ["clasifier"]}})


# -- memory


def test_memory_is_kept_to_or_refused(family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # What this process holds grows from test to test.
    monkeypatch.setattr(memory, "baseline_bytes", lambda: 400_000_000)
    big = {"model.big.weight": torch.zeros(1 << 21)}
    for name, seed in (("base", 0), ("a", 1)):
        make_llama(tmp_path / name, seed, extra=big)
    ask = recipe(tmp_path / "base", tmp_path / "a", method="slerp")
    free = api.plan(ask)
    assert tensors(free)["model.big.weight"].held
    held = 2 * 4 * (1 << 21)
    assert free.cost.peak_bytes_per_worker > free.cost.baseline_bytes + held
    budget = free.cost.peak_bytes_per_worker - held // 2
    tight = api.plan(ask, memory=budget)
    assert not tensors(tight)["model.big.weight"].held
    assert tight.cost.peak_bytes_per_worker <= budget
    assert tight.cost.bytes_read == free.cost.bytes_read + held
    assert tight.digest == free.digest
    with pytest.raises(MemoryBudgetError, match=r"lm_head.weight: merging .* per worker, of which .* are libraries"):
        api.plan(ask, memory="10MB")
    api.merge(ask, tmp_path / "free", local=True)
    api.merge(ask, tmp_path / "tight", local=True, memory=budget)
    assert (tmp_path / "free" / "model.safetensors").read_bytes() == (
        tmp_path / "tight" / "model.safetensors"
    ).read_bytes()


def test_a_tensor_that_must_be_whole_is_named_when_it_does_not_fit(tmp_path: Path) -> None:
    for name, seed in (("base", 0), ("a", 1), ("b", 2)):
        save(tmp_path / name, {"small.weight": torch.zeros(4, 4), "wide.weight": torch.full((2048, 1024), float(seed))})
    ask = recipe(tmp_path / "base", tmp_path / "a", tmp_path / "b", method="iso_c")
    free = api.plan(ask)
    with pytest.raises(MemoryBudgetError, match=r"wide.weight: merging \(2048, 1024\) takes"):
        api.plan(
            ask, memory=free.cost.baseline_bytes + (free.cost.peak_bytes_per_worker - free.cost.baseline_bytes) // 2
        )


@pytest.mark.parametrize("text", ["much", "-1GB", "0", "1.2.3GB", "5 apples"])
def test_a_size_that_is_none(family: Path, text: str) -> None:
    with pytest.raises(RecipeError, match="compute.memory: found"):
        api.plan(recipe(family / "base", family / "math"), memory=text)


# -- a plan is data


RECIPES: list[dict[str, Any]] = [
    {"method": "linear", "settings": {"coefficient": [0.2, 0.8]}},
    {"method": "ties", "settings": {"density": 0.3}},
    {"method": "slerp", "experts": ["math"]},
    {"method": "della", "output": {"shard_size": 4000, "tokenizer": "base", "chat_template": "chatml"}, "seed": 7},
]


@pytest.mark.parametrize("change", RECIPES, ids=lambda change: change["method"])
def test_a_plan_is_json_both_ways(family: Path, change: dict[str, Any]) -> None:
    names = change.get("experts", ["math", "code"])
    ask = recipe(family / "base", *(family / name for name in names))
    planned = api.plan({**ask, **{key: value for key, value in change.items() if key != "experts"}})
    read = Plan.from_json(planned.to_json())
    assert read == planned
    assert read.digest == planned.digest
    assert [call.build() for call in read.calls] == [call.build() for call in planned.calls]


def test_the_digest_is_of_what_will_be_written(family: Path, tmp_path: Path) -> None:
    ask = recipe(family / "base", family / "math", family / "code", method="ties")
    digest = api.plan(ask).digest
    assert api.plan({**ask, "compute": {"workers": 3}}).digest == digest
    for change in (
        {"settings": {"density": 0.3}},
        {"seed": 1},
        {"output": {"shard_size": 4000}},
        {"output": {"dtype": "bfloat16"}},
        {"experts": dict(reversed(ask["experts"].items()))},
    ):
        assert api.plan({**ask, **change}).digest != digest
    text = "import sys, json; from raymerge import api; print(api.plan(json.loads(sys.argv[1])).digest)"
    for seed in ("0", "123"):
        assert python(text, json.dumps(ask), PYTHONHASHSEED=seed).stdout.strip() == digest


def test_files_are_filled_in_order(family: Path) -> None:
    ask = recipe(family / "base", family / "math", output={"shard_size": 4000})
    planned = api.plan(ask)
    count = len(planned.shards)
    assert count > 3
    assert [shard.file for shard in planned.shards] == [
        f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)
    ]
    for shard in planned.shards:
        assert sum(4 * t.num_elements for t in shard.tensors) <= 4000 or len(shard.tensors) == 1
    assert planned.cost.bytes_written == sum(t.nbytes for t in load(family / "base").values())
    assert planned.cost.bytes_read == planned.cost.bytes_written  # linear does not read the base


def test_counts_and_scopes_of_methods(family: Path) -> None:
    with pytest.raises(RecipeError, match="slerp merges 1 experts; the recipe has 2 here"):
        api.plan(recipe(family / "base", family / "math", family / "code", method="slerp"))
    depth = recipe(family / "base", family / "math", family / "code", method="ties")
    with pytest.raises(RecipeError, match="ties ranks entries over the whole model, so density"):
        api.plan({**depth, "settings": {"density": [0.1, 0.9]}})
    with pytest.raises(RecipeError, match="linear: the coefficients add up to 0"):
        api.plan(recipe(None, family / "math", family / "code", settings={"coefficient": 0}))


def test_a_chat_template_that_means_nothing(family: Path) -> None:
    with pytest.raises(RecipeError, match="output.chat_template: found 'chatm'"):
        api.plan(recipe(family / "base", family / "math", output={"chat_template": "chatm"}))


def test_settings_reach_the_tensors_they_name(family: Path) -> None:
    ask = recipe(family / "base", family / "math", family / "code", method="task_arithmetic")
    ask["settings"] = {"coefficient": [{"filter": "mlp", "value": [0, 1]}, {"value": 0.25}]}
    ask["experts"]["code"] = {
        "path": ask["experts"]["code"],
        "settings": {"coefficient": [{"filter": "up_proj", "value": 7}]},
    }
    planned = api.plan(ask)
    found = {
        name: planned.calls[tensor.call].settings["coefficient"]
        for name, tensor in tensors(planned).items()
        if tensor.call is not None
    }
    assert found["model.layers.0.mlp.down_proj.weight"] == (0.0, 0.0)
    assert found["model.layers.1.mlp.down_proj.weight"] == (1.0, 1.0)
    assert found["model.layers.1.mlp.up_proj.weight"] == (1.0, 7)
    assert found["model.norm.weight"] == (0.25, 0.25)


def test_a_damaged_expert_is_found_by_the_plan(family: Path, tmp_path: Path) -> None:
    folder = make_llama(tmp_path / "cut", 1)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="cut short"):
        api.plan(recipe(family / "base", folder))
