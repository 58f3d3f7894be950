"""How long merging takes on some nodes: against sums made by hand, and against the bytes that a merge really reads."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from command import raymerge
from tiny import make_llama, recipe, save

from raymerge import api
from raymerge.checkpoint.location import Location
from raymerge.checkpoint.reader import Reader
from raymerge.errors import RecipeError
from raymerge.plan import memory
from raymerge.plan.schema import Plan

# A tensor of the family below, in bytes; each stands in a file of its own.
SIZES = [4 * 64 * n for n in (9, 7, 7, 5, 4, 4, 3, 1)]


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("family")
    for seed, name in enumerate(("base", "a", "b", "c")):
        torch.manual_seed(seed)
        save(folder / name, {f"t{i}": torch.randn(size // 4) for i, size in enumerate(SIZES)})
    return folder


def plan(family: Path, method: str = "task_arithmetic", memory: int | None = None, **more: Any) -> Plan:
    experts = [family / name for name in (("a",) if method == "slerp" else ("a", "b", "c"))]
    return api.plan(recipe(family / "base", *experts, method=method, output={"shard_size": 1}, **more), memory=memory)


def shared_out(sizes: Sequence[int], count: int) -> list[list[int]]:
    """The largest first, each to the one that has least: written as it is said."""
    shares: list[list[int]] = [[] for _ in range(count)]
    for size in sorted(sizes, reverse=True):
        min(shares, key=sum).append(size)
    return shares


@pytest.mark.parametrize("num_nodes", [1, 2, 3, 8, 20])
@pytest.mark.parametrize("rates", [(1, 10**9, 10**9), (10**9, 1, 10**9), (10**9, 10**9, 1)])
def test_the_busiest_node_decides(family: Path, num_nodes: int, rates: tuple[int, int, int]) -> None:
    disk, network, memory_rate = rates
    found, *_ = api.forecast(
        plan(family), [num_nodes], workers_per_node=2, disk=disk, network=network, memory_rate=memory_rate
    )
    nodes = shared_out(SIZES, num_nodes)
    # A base and three experts in, one out; every input is moved as it is stored, and again as float32.
    seconds = {
        "disk": max(sum(share) * 5 / disk for share in nodes),
        "network": max(sum(share) * 5 / network for share in nodes) if num_nodes > 1 else 0.0,
        "memory": max(sum(own) * 9 / memory_rate for share in nodes for own in shared_out(share, 2)),
    }
    assert found.bound == max(seconds, key=lambda resource: seconds[resource])
    assert found.minutes == pytest.approx(max(seconds.values()) / 60)
    assert found.num_busy == sum(min(len(share), 2) for share in nodes)
    assert found.bytes_read == 4 * found.bytes_written
    if found.bound != "memory":
        assert found.bytes_written == max(sum(share) for share in nodes)
        assert found.num_shards in [len(share) for share in nodes if sum(share) == found.bytes_written]


def test_more_nodes_than_files_are_of_no_use(family: Path) -> None:
    eight, many = api.forecast(plan(family), [8, 64])
    assert eight.minutes == many.minutes and many.num_shards == 1 and many.num_busy == 8


PASSES = [*((name, False) for name in ("linear", "ties", "pcb", "slerp", "sce")), ("slerp", True), ("sce", True)]


@pytest.mark.parametrize(("method", "tight"), PASSES)
def test_every_pass_is_counted(
    family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, tight: bool
) -> None:
    """The bytes that a merge reads, rounds of statistics and all, are those of the forecast."""
    monkeypatch.setattr(memory, "baseline_bytes", lambda: 400_000_000)
    planned, budget = plan(family, method), None
    if tight:
        # Not enough to hold the largest tensor between passes.
        budget = planned.cost.peak_bytes_per_worker - 1
        planned = plan(family, method, memory=budget)
        assert not all(tensor.held for shard in planned.shards for tensor in shard.tensors)
    read = []
    original = Reader.read

    def counted(self: Reader, *arguments: Any) -> torch.Tensor:
        entries = original(self, *arguments)
        read.append(entries.nbytes)
        return entries

    monkeypatch.setattr(Reader, "read", counted)
    experts = [family / name for name in (("a",) if method == "slerp" else ("a", "b", "c"))]
    asked = recipe(family / "base", *experts, method=method, output={"shard_size": 1})
    api.merge(asked, tmp_path / "out", local=True, memory=budget)
    (found,) = api.forecast(planned, [1])
    assert found.bytes_read == sum(read) == planned.cost.bytes_read


def test_object_storage_is_read_over_the_network(family: Path) -> None:
    planned = plan(family)
    models = tuple(
        replace(model, location=Location("s3://bucket/a")) if model.name == "a" else model for model in planned.models
    )
    here, there = (api.forecast(one, [1, 2], disk=1, network=1) for one in (planned, replace(planned, models=models)))
    total = sum(SIZES)
    assert here[0].seconds["network"] == 0 and here[0].seconds["disk"] == 5 * total
    assert there[0].seconds["network"] == total and there[0].seconds["disk"] == 4 * total
    # On several nodes all goes over the network, and what lies in folders comes from their storage too.
    busiest = max(sum(share) for share in shared_out(SIZES, 2))
    assert there[1].seconds["network"] == here[1].seconds["network"] == 5 * busiest
    assert there[1].seconds["disk"] == 4 * busiest


def test_what_the_minutes_are_not_of(family: Path, tmp_path: Path) -> None:
    assert api.forecast(plan(family), [1])[0].left_out == ()
    (whole,) = api.forecast(plan(family, "iso_c"), [1])
    assert whole.left_out == ("the decompositions of whole matrices that iso_c makes",)
    for name in ("base", "x", "y"):
        make_llama(tmp_path / name)
        (tmp_path / name / "model.safetensors").unlink()
    learned = api.plan(recipe(tmp_path / "base", tmp_path / "x", tmp_path / "y", method="prodistill"))
    (found,) = api.forecast(learned, [1])
    assert found.left_out == (f"fitting, and the {len(learned.learned_shards)} files of what is fitted",)
    # Embeddings, the last norm and the output matrix: float32, 32 by 16 and 16.
    assert found.bytes_written == 4 * (2 * 32 * 16 + 16)


def test_a_405b_family_on_paper(tmp_path: Path) -> None:
    """From `config.json` alone: the sizes of the largest Llama 3.1, its base and eight experts."""
    hidden, blocks, inner, rows, heads, kv = 16384, 126, 53248, 128256, 128, 8
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "num_hidden_layers": blocks,
        "intermediate_size": inner,
        "vocab_size": rows,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "dtype": "bfloat16",
    }
    names = ["base", *(f"e{i}" for i in range(8))]
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    attention = 2 * hidden * hidden + 2 * hidden * (hidden // heads * kv)
    size = 2 * (2 * rows * hidden + hidden + blocks * (attention + 3 * hidden * inner + 2 * hidden))
    content = recipe(*(tmp_path / name for name in names), method="task_arithmetic")
    (tmp_path / "recipe.json").write_text(json.dumps(content))
    wanted = ("--nodes=1", "--nodes=8", "--nodes=64", "--disk=2GB", "--network=2GB", "--memory-rate=1GB")
    printed = raymerge("plan", tmp_path / "recipe.json", "--json", *wanted)
    found = json.loads(printed.stdout)
    assert size == 811_706_777_600
    assert (found["bytes_read"], found["bytes_written"]) == (9 * size, size)
    one, eight, many = found["forecasts"]
    assert one["bytes_read"] == 9 * size and one["minutes"] == pytest.approx(10 * size / 2e9 / 60)
    assert one["num_shards"] == len(found["shards"])
    assert one["minutes"] / 8 <= eight["minutes"] < one["minutes"] / 7.5
    # Three files of 4 to 5 GB on the busiest of 64 nodes: no worker has less to do than one file.
    assert many["bound"] == "memory" and many["num_shards"] == 3
    shown = raymerge("plan", tmp_path / "recipe.json", "--nodes", "64")
    assert "bound by" in shown.stdout and "512" in shown.stdout


def test_rates_that_mean_nothing(family: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="network: found 'fast'"):
        api.forecast(plan(family), [1], network="fast")
    (tmp_path / "recipe.json").write_text(json.dumps(recipe(family / "base", family / "a")))
    alone = raymerge("plan", tmp_path / "recipe.json", "--disk", "1GB")
    assert alone.returncode == 2 and "say --nodes" in alone.stderr
