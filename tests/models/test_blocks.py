"""Blocks are found from tensor names alone."""

import pytest

from raymerge.models.blocks import BlockName, block_lists, block_name, natural_order


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.layers.7.mlp.up_proj.weight", BlockName("model.layers", 7, "mlp.up_proj.weight")),
        ("h.11.attn.c_attn.bias", BlockName("h", 11, "attn.c_attn.bias")),
        ("0.weight", BlockName("", 0, "weight")),
        # Experts of a mixture lie inside their block.
        ("model.layers.3.mlp.experts.12.w1.weight", BlockName("model.layers", 3, "mlp.experts.12.w1.weight")),
        ("model.embed_tokens.weight", None),
        ("layer4x.weight", None),
    ],
)
def test_a_name_taken_apart(name: str, expected: BlockName | None) -> None:
    found = block_name(name)
    assert found == expected
    if found is not None:
        assert found.at(found.index) == name
        assert found.at(99) == name.replace(str(found.index), "99", 1)


def test_lists_of_blocks() -> None:
    names = [f"encoder.block.{i}.layer.{j}.w" for i in range(3) for j in range(2)]
    names += [f"decoder.block.{i}.w" for i in range(2)] + ["shared.weight", "heads.5.w"]
    assert block_lists(names) == {"encoder.block": 3, "decoder.block": 2}


def test_two_comes_before_ten() -> None:
    names = ["layers.10.w", "layers.2.w", "embed", "layers.2.b"]
    assert sorted(names, key=natural_order) == ["embed", "layers.2.b", "layers.2.w", "layers.10.w"]
