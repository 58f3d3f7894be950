"""Any trunk, run block by block with recorded calls, is the model that transformers runs."""

import json
from pathlib import Path

import pytest
import torch
from architectures import FAMILIES, inputs_of, make, save
from safetensors.torch import load_file

from raymerge.errors import RecipeError
from raymerge.models.trunk import Flow, Trunk, block_parameters, output_of


def checkpoint(folder: Path) -> tuple[dict, dict[str, torch.Tensor]]:
    return json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")


@pytest.mark.parametrize("family", FAMILIES)
def test_block_by_block_is_the_model(family: str, tmp_path: Path) -> None:
    config, tensors = checkpoint(save(family, tmp_path))
    trunk = Trunk(config)
    parameters = trunk.conversion.to_model(tensors)
    outside = {name: parameters[name] for name in trunk.outside if name in parameters}
    trunk.leave_out(trunk.outside.keys() - outside.keys())
    inputs = inputs_of(family)
    done: dict[str, torch.Tensor] = {}
    with torch.no_grad():
        for stack in trunk.stacks:
            assert stack.num_blocks == 3
            start, calls = trunk.record(stack, outside, inputs, done)
            first = block_parameters(stack, 0, parameters)
            trunk.num_handed[stack.name] = len(trunk.run_block(stack, 0, first, start, calls[0]).handed)
            flow, calls = trunk.record(stack, outside, inputs, done)
            for block, call in enumerate(calls):
                weights = block_parameters(stack, block, parameters)
                assert weights.keys() == trunk.parameters_of(stack, block).keys()
                flow = trunk.run_block(stack, block, weights, flow, call)
            done[stack.name] = flow.hidden
        found = trunk.run_tail(outside, inputs, done)
        model = make(family)
        expected = getattr(model, model.base_model_prefix, model)(**inputs)
    seen = inputs.get("attention_mask", torch.ones(1)).bool()
    for key in ("last_hidden_state", "pooler_output"):
        ours, theirs = getattr(found, key, None), getattr(expected, key, None)
        if ours is None or theirs is None:
            continue
        if ours.ndim == 3 and seen.ndim == 2:
            ours, theirs = ours[seen], theirs[seen]
        assert torch.allclose(ours, theirs, atol=2e-6), (key, (ours - theirs).abs().max())
    with torch.no_grad():
        at_once = trunk.run(parameters, inputs)
    assert torch.allclose(output_of(at_once), output_of(found), atol=2e-6)
    assert output_of(found).isfinite().all()
    assert isinstance(flow, Flow)


@pytest.mark.parametrize("family", FAMILIES)
def test_names_there_and_back(family: str, tmp_path: Path) -> None:
    config, tensors = checkpoint(save(family, tmp_path))
    trunk = Trunk(config)
    owners = {name: trunk.conversion.parameter_of(name)[0] or "" for name in tensors}
    for stack in trunk.stacks:
        for block in range(stack.num_blocks):
            prefix = stack.parameter_prefix(block)
            inside = {name: tensors[name] for name, owner in owners.items() if owner.startswith(prefix)}
            parameters = trunk.conversion.to_model(inside)
            assert len(parameters) == len(trunk.parameters_of(stack, block))
            back = trunk.conversion.to_checkpoint(inside, parameters)
            assert back.keys() == inside.keys()
            assert all(torch.equal(back[name], inside[name]) for name in inside)


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("bert", ["pooler.dense.weight", "pooler.dense.bias"]),
        ("vit", ["layernorm.weight", "layernorm.bias"]),
        ("llama", ["norm.weight"]),
        ("gpt2", ["ln_f.weight", "ln_f.bias"]),
    ],
)
def test_the_tail(family: str, expected: list[str], tmp_path: Path) -> None:
    config, tensors = checkpoint(save(family, tmp_path))
    trunk = Trunk(config)
    trunk.leave_out(trunk.outside.keys() - trunk.conversion.to_model(tensors).keys())
    assert trunk.tail == expected


def test_blocks_may_be_named(tmp_path: Path) -> None:
    config, _ = checkpoint(save("llama", tmp_path))
    assert Trunk(config, "layers").stacks == Trunk(config, "model.layers").stacks == Trunk(config).stacks
    with pytest.raises(RecipeError, match=r"settings.blocks: found 'blocks'; lists of blocks are layers \(3\)"):
        Trunk(config, "blocks")
