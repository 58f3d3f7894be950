"""Scores against the same models run row by row, without batches, padding or sorting."""

import io
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from sklearn import metrics

from raymerge import api
from raymerge.errors import CheckpointError, RecipeError
from raymerge.evaluate.measure import Score, measure
from raymerge.models.small import save_vision_classifier, small_vision_classifier
from raymerge.recipe.schema import Task

from .conftest import WORDS, save_text_classifier, save_tokenizer, texts, write_jsonl, write_parquet

SKLEARN = {
    "accuracy": metrics.accuracy_score,
    "f1": lambda y, p: metrics.f1_score(y, p, average="macro"),
    "matthews": metrics.matthews_corrcoef,
}


def task(data: str, **settings: Any) -> Task:
    return Task(**{"task": "letters", "kind": "classification", "data": data, **settings})


def predict(folder: Path, rows: list[Any]) -> list[int]:
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    with torch.inference_mode():
        return [int(model(**tokenizer(*row, return_tensors="pt")).logits.argmax()) for row in rows]


@pytest.mark.parametrize("metric", SKLEARN)
@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_text_classification(classifier: Path, tmp_path: Path, metric: str, batch_size: int) -> None:
    rows = texts(40)
    predicted = predict(classifier, [(row,) for row in rows])
    assert len(set(predicted)) == 3
    labels = [(p + (i % 3 == 0)) % 3 for i, p in enumerate(predicted)]
    data = write_parquet(tmp_path / "rows.parquet", {"text": rows, "label": labels})
    found = measure(str(classifier), task(data, metric=metric, batch_size=batch_size))
    assert found.score == pytest.approx(SKLEARN[metric](labels, predicted))
    assert (found.task, found.metric, found.num_rows) == ("letters", metric, 40)
    assert found.elapsed_seconds > 0


def test_pairs_and_class_names(classifier: Path, tmp_path: Path) -> None:
    first, second = texts(20, 1, 9), texts(20, 2, 9)
    predicted = predict(classifier, list(zip(first, second, strict=True)))
    assert len(set(predicted)) > 1
    rows = {"one": first, "two": second, "label": [f"LABEL_{p}" for p in predicted]}
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    assert measure(str(classifier), task(data, text="one", text_pair="two", batch_size=6)).score == 1.0


@pytest.mark.parametrize(
    "label, message",
    [
        (3, "row 1: found 3; a class of the model, 0 to 2"),
        (-1, "found -1"),
        ("LABEL_9", "no class 'LABEL_9'; did you mean"),
    ],
)
def test_labels_the_model_does_not_have(classifier: Path, tmp_path: Path, label: Any, message: str) -> None:
    first = "LABEL_0" if isinstance(label, str) else 0
    data = write_parquet(tmp_path / "rows.parquet", {"text": ["a", "b"], "label": [first, label]})
    with pytest.raises(RecipeError, match=message):
        measure(str(classifier), task(data))


def test_rows_longer_than_the_model_reads(classifier: Path, tmp_path: Path) -> None:
    data = write_parquet(tmp_path / "rows.parquet", {"text": ["a " * 30], "label": [0]})
    with pytest.raises(RecipeError, match="a row has 32 tokens, the model reads 24"):
        measure(str(classifier), task(data))
    assert measure(str(classifier), task(data, max_length=24)).num_rows == 1


def test_heads_of_merged_and_of_base(tmp_path: Path) -> None:
    save_text_classifier(tmp_path / "two", 2, 1)
    save_text_classifier(tmp_path / "three", 3, 2)
    transformers.BertModel.from_pretrained(tmp_path / "two").save_pretrained(tmp_path / "base")
    save_tokenizer(tmp_path / "base")
    experts = {"two": str(tmp_path / "two"), "three": str(tmp_path / "three")}
    api.merge({"base": str(tmp_path / "base"), "experts": experts, "method": "linear"}, tmp_path / "out", local=True)
    rows = texts(30)
    own = predict(tmp_path / "two", [(row,) for row in rows])
    assert len(set(own)) == 2
    data = write_parquet(tmp_path / "rows.parquet", {"text": rows, "label": own})
    # The base is the trunk of `two`, so with its head it is `two`.
    assert measure(str(tmp_path / "base"), task(data), head_from=experts["two"]).score == 1.0
    merged = measure(str(tmp_path / "out"), task(data), head="two").score
    assert 0 < merged < 1
    with pytest.raises(CheckpointError, match="classifier"):
        measure(str(tmp_path / "out"), task(data))
    with pytest.raises(CheckpointError, match="no expert 'four'"):
        measure(str(tmp_path / "out"), task(data), head="four")


def save_language_model(folder: Path, family: str, *, special: bool = False, pad: bool = True) -> None:
    torch.manual_seed(5)
    if family == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=len(WORDS), n_embd=16, n_layer=2, n_head=2, n_positions=64, initializer_range=0.3
        )
        transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    else:
        config = transformers.LlamaConfig(
            vocab_size=len(WORDS),
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            intermediate_size=32,
            max_position_embeddings=64,
            initializer_range=0.3,
        )
        transformers.LlamaForCausalLM(config).save_pretrained(folder)
    save_tokenizer(folder, special=special, pad=pad)


def naive_perplexity(folder: Path, rows: list[str], max_length: int) -> float:
    """One row at a time, in float64, one token at a time."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    total, count = 0.0, 0
    with torch.inference_mode():
        for row in rows:
            ids = tokenizer(row)["input_ids"][:max_length]
            logits = model(torch.tensor([ids])).logits[0]
            for position in range(1, len(ids)):
                scores = [float(v) for v in logits[position - 1]]
                top = max(scores)
                total -= scores[ids[position]] - top - math.log(sum(math.exp(s - top) for s in scores))
                count += 1
    return math.exp(total / count)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("pad", [True, False])
def test_perplexity(tmp_path: Path, family: str, pad: bool) -> None:
    save_language_model(tmp_path, family, pad=pad)
    rows = texts(25, 3)
    data = write_jsonl(tmp_path / "rows.jsonl", {"body": rows})
    settings = {"kind": "perplexity", "text": "body", "max_length": 12, "batch_size": 4}
    found = measure(str(tmp_path), task(data, **settings))
    assert found.metric == "perplexity"
    assert found.score == pytest.approx(naive_perplexity(tmp_path, rows, 12), rel=1e-5)


def test_perplexity_of_single_tokens(tmp_path: Path) -> None:
    save_language_model(tmp_path, "gpt2")
    data = write_jsonl(tmp_path / "rows.jsonl", {"text": ["a", "b"]})
    with pytest.raises(RecipeError, match="no row has two tokens"):
        measure(str(tmp_path), task(data, kind="perplexity"))


def test_empty_text(tmp_path: Path) -> None:
    save_language_model(tmp_path, "gpt2")
    data = write_jsonl(tmp_path / "rows.jsonl", {"text": ["a b", ""]})
    with pytest.raises(RecipeError, match="row 1 has no tokens"):
        measure(str(tmp_path), task(data, kind="perplexity"))


def test_classifier_of_the_last_token(tmp_path: Path) -> None:
    """Decoders classify by their last token, which must not be padding."""
    torch.manual_seed(4)
    config = transformers.GPT2Config(
        vocab_size=len(WORDS), n_embd=16, n_layer=2, n_head=2, n_positions=64, num_labels=3, initializer_range=0.5
    )
    transformers.GPT2ForSequenceClassification(config).save_pretrained(tmp_path)
    save_tokenizer(tmp_path, special=False, pad=False)
    rows = texts(30, 6)
    predicted = predict(tmp_path, [(row,) for row in rows])
    assert len(set(predicted)) > 1
    data = write_parquet(tmp_path / "rows.parquet", {"text": rows, "label": predicted})
    assert measure(str(tmp_path), task(data, batch_size=8)).score == 1.0


def test_language_model_is_no_classifier(classifier: Path, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "rows.jsonl", {"text": ["a b"], "label": [0]})
    with pytest.raises(CheckpointError):
        measure(str(classifier), task(data, kind="perplexity"))


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("digits")
    model = small_vision_classifier(image_size=8, patch_size=4, hidden_size=16, num_blocks=1, num_labels=4, seed=3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8)
    save_vision_classifier(model, folder)
    return folder


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize("form", ["pixels", "bytes", "struct"])
def test_image_classification(digits: Path, tmp_path: Path, form: str) -> None:
    images = np.random.default_rng(0).integers(0, 256, (30, 8, 8), dtype=np.uint8)
    model = transformers.ViTForImageClassification.from_pretrained(digits).eval()
    with torch.inference_mode():
        predicted = [
            int(model(pixel_values=(torch.tensor(image)[None, None].float() / 127.5 - 1)).logits.argmax())
            for image in images
        ]
    assert len(set(predicted)) > 1
    cells = {
        "pixels": lambda image: image.tolist(),
        "bytes": png,
        "struct": lambda image: {"bytes": png(image), "path": None},
    }
    rows = {"image": [cells[form](image) for image in images], "label": predicted}
    data = write_parquet(tmp_path / "rows.parquet", rows)
    assert measure(str(digits), task(data, batch_size=8)).score == 1.0


def test_scores_travel_between_processes(classifier: Path, tmp_path: Path) -> None:
    import pickle

    data = write_parquet(tmp_path / "rows.parquet", {"text": ["a"], "label": [0]})
    found = measure(str(classifier), task(data))
    assert isinstance(found, Score) and pickle.loads(pickle.dumps(found)) == found
