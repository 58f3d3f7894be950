"""Slices: the output's blocks are runs of the models' blocks."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import load, make_bert, make_llama, recipe

from raymerge import api
from raymerge.errors import MismatchError, RecipeError

KINDS = ["full_attention", "sliding_attention", "full_attention", "chunked_attention"]


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("slices")
    make_llama(folder / "base", blocks=4, config={"layer_types": KINDS, "untouched": [1, 2, 3]})
    make_llama(folder / "a", 1, blocks=4, config={"layer_types": list(reversed(KINDS))})
    make_llama(folder / "b", 2, blocks=4, config={"layer_types": KINDS})
    make_llama(folder / "bare", 3, blocks=4)
    return folder


def ask(family: Path, slices: list[dict[str, Any]], method: str = "passthrough", **more: Any) -> dict[str, Any]:
    return recipe(family / "base", family / "a", family / "b", method=method, slices=slices, **more)


def test_blocks_are_stacked(family: Path, tmp_path: Path) -> None:
    slices = [{"sources": {"a": [0, 3]}}, {"sources": {"a": [1, 4]}}]
    out = tmp_path / "out"
    result = api.merge(recipe(None, family / "a", method="passthrough", slices=slices), out, local=True)
    found, a = load(out), load(family / "a")
    assert result.plan.config["num_hidden_layers"] == 6
    assert result.plan.config["layer_types"] == [*reversed(KINDS)][0:3] + [*reversed(KINDS)][1:4]
    for position, block in enumerate([0, 1, 2, 1, 2, 3]):
        for name, value in a.items():
            if name.startswith(f"model.layers.{block}."):
                other = name.replace(f"layers.{block}.", f"layers.{position}.")
                assert torch.equal(found.pop(other), value), other
    assert found.keys() == {"lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"}


def test_what_stands_around_the_blocks_comes_from_its_slice(family: Path, tmp_path: Path) -> None:
    slices = [{"sources": {"a": [0, 2]}}, {"sources": {"b": [2, 4]}}]
    api.merge(ask(family, slices), tmp_path / "out", local=True)
    found, a, b = load(tmp_path / "out"), load(family / "a"), load(family / "b")
    for name, value in found.items():
        block = name.startswith("model.layers.") and int(name.split(".")[2])
        owner = a if name == "model.embed_tokens.weight" or (block is not False and block < 2) else b
        assert torch.equal(value, owner[name]), name


def test_slices_merge_with_their_own_settings_and_gradients(family: Path, tmp_path: Path) -> None:
    slices = [
        {"sources": {"base": [0, 2], "a": [0, 2]}, "settings": {"coefficient": [0, 1]}},
        {"sources": {"base": [2, 4], "a": {"blocks": [2, 4], "settings": {"coefficient": 0.25}}}},
    ]
    mixed = ask(family, slices, method="task_arithmetic", settings={"coefficient": 0.5})
    api.merge(mixed, tmp_path / "out", local=True)
    found, base, a = load(tmp_path / "out"), load(family / "base"), load(family / "a")
    for block, coefficient in enumerate([0.0, 1.0, 0.25, 0.25]):
        name = f"model.layers.{block}.mlp.up_proj.weight"
        torch.testing.assert_close(found[name], base[name] + coefficient * (a[name] - base[name]))


def test_lists_per_block_follow_the_blocks(family: Path) -> None:
    planned = api.plan(ask(family, [{"sources": {"b": [1, 3]}}, {"sources": {"a": [0, 1]}}]))
    assert planned.config["layer_types"] == [*KINDS[1:3], KINDS[::-1][0]]
    assert planned.config["untouched"] == [1, 2, 3]
    assert planned.config["num_hidden_layers"] == 3
    with pytest.raises(MismatchError, match="config.json has no layer_types for block 0"):
        slices = [{"sources": {"a": [0, 1]}}, {"sources": {"bare": [0, 1]}}]
        api.plan(recipe(family / "base", family / "a", family / "bare", method="passthrough", slices=slices))


@pytest.mark.parametrize(
    ("slices", "error", "said"),
    [
        ([{"sources": {"a": [0, 2], "base": [0, 3]}}], RecipeError, "slices.0: sources must have the same number"),
        ([{"sources": {"a": [2, 2]}}], RecipeError, "at least 1; found a"),
        ([{"sources": {"a": [-1, 2]}}], RecipeError, "slices.0: sources must have"),
        ([{"sources": {"a": [3, 5]}}], MismatchError, "none of a has it; check the block ranges"),
        ([{"sources": {"a": [0, 2], "b": [0, 2]}}], RecipeError, "needs the base here"),
    ],
)
def test_slices_that_cannot_be(family: Path, slices: list[dict[str, Any]], error: type[Exception], said: str) -> None:
    method = "task_arithmetic" if "needs" in said else "linear"
    with pytest.raises(error, match=said):
        api.plan(ask(family, slices, method=method))


def test_a_model_without_one_list_of_blocks(tmp_path: Path) -> None:
    make_bert(tmp_path / "a")
    config = (tmp_path / "a" / "config.json").read_text().replace('"num_hidden_layers": 2', '"num_hidden_layers": 5')
    (tmp_path / "a" / "config.json").write_text(config)
    with pytest.raises(MismatchError, match=r"slices need one list of 5 blocks; found encoder.layer \(2\)"):
        api.plan(recipe(None, tmp_path / "a", method="passthrough", slices=[{"sources": {"a": [0, 1]}}]))
