"""What model families say of themselves, on the meta device."""

from typing import Any

import pytest

from raymerge.errors import CheckpointError
from raymerge.models.families import base_model_prefix, num_blocks_key, skeleton

SMALL: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 40,
}


def config(architecture: str, kind: str, **more: Any) -> dict[str, Any]:
    return {**SMALL, "architectures": [architecture], "model_type": kind, **more}


@pytest.mark.parametrize(
    ("given", "prefix", "inputs", "outputs"),
    [
        (config("LlamaForCausalLM", "llama"), "model", "model.embed_tokens.weight", ("lm_head.weight",)),
        (config("BertModel", "bert"), "bert", "embeddings.word_embeddings.weight", ()),
        (
            config("BertForMaskedLM", "bert"),
            "bert",
            "bert.embeddings.word_embeddings.weight",
            ("cls.predictions.decoder.weight", "cls.predictions.decoder.bias"),
        ),
        (
            config("BertForSequenceClassification", "bert"),
            "bert",
            "bert.embeddings.word_embeddings.weight",
            (),
        ),
        (
            {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "n_embd": 16, "n_head": 2, "n_layer": 2},
            "transformer",
            "transformer.wte.weight",
            ("lm_head.weight",),
        ),
        (
            {"architectures": ["T5ForConditionalGeneration"], "model_type": "t5", "d_model": 16, "num_layers": 2},
            "transformer",
            "shared.weight",
            ("lm_head.weight",),
        ),
    ],
    ids=lambda value: value["architectures"][0] if isinstance(value, dict) else None,
)
def test_prefix_and_embeddings(
    given: dict[str, Any], prefix: str, inputs: str | None, outputs: tuple[str, ...]
) -> None:
    found = skeleton(given)
    assert base_model_prefix(given) == prefix
    assert found.input_embedding == inputs
    assert found.output_embeddings == outputs
    assert inputs in found.parameters


def test_tied_embeddings() -> None:
    assert skeleton(config("LlamaForCausalLM", "llama", tie_word_embeddings=True)).tied
    assert not skeleton(config("LlamaForCausalLM", "llama", tie_word_embeddings=False)).tied


def test_image_models_have_no_rows_of_tokens() -> None:
    found = skeleton(config("ViTForImageClassification", "vit", image_size=8, patch_size=4))
    assert "vit.encoder.layer.0.attention.attention.query.weight" in found.parameters or any(
        name.startswith("vit.") for name in found.parameters
    )
    assert found.output_embeddings == ()


def test_unknown_models() -> None:
    assert base_model_prefix({"model_type": "homemade"}) is None
    with pytest.raises(CheckpointError, match="architectures .* are unknown to transformers"):
        skeleton({"architectures": ["HomemadeForCausalLM"], "model_type": "homemade"})
    with pytest.raises(CheckpointError, match="LlamaForCausalLM cannot be built from it"):
        skeleton(config("LlamaForCausalLM", "llama", hidden_size="many"))


def test_the_key_that_counts_blocks() -> None:
    assert num_blocks_key({"n_layer": 2}) == "n_layer"
    assert num_blocks_key(SMALL) == "num_hidden_layers"
    with pytest.raises(CheckpointError, match="no number of blocks"):
        num_blocks_key({"model_type": "x"})
