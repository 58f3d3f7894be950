"""Measure one model on one task.

Shapes: B rows, T tokens, K classes, V entries of the vocabulary.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from raymerge.errors import CheckpointError, RecipeError, nearest
from raymerge.evaluate.metrics import perplexity, score_classes
from raymerge.evaluate.rows import open_rows
from raymerge.learn.batches import tokenise
from raymerge.learn.images import to_pixels
from raymerge.models import heads, load

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from raymerge.recipe.schema import Task


@dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """What a model reached on a task. `metric` says what `score` is; perplexity is better when lower."""

    task: str
    metric: str
    score: float
    num_rows: int
    elapsed_seconds: float


def measure(
    model: str, task: "Task", *, head: str | None = None, head_from: str | None = None, device: str = "cpu"
) -> Score:
    """The score of a model on a task.

    `model` is a checkpoint, as a folder or hub id. `head` is the name of an expert if it is a merged
    folder, and that expert's head is to be used; `head_from` is the checkpoint of an expert if it is a base
    without a head of its own. `device` is cpu or cuda.

    Raises RecipeError if the task's data does not fit, CheckpointError if the model does not load.
    """
    assert head is None or head_from is None, "a head comes from one place"
    begun = time.perf_counter()
    network = _load(model, task, head, head_from, device)
    with torch.inference_mode():
        metric, score, num_rows = (
            _measure_text(network, model, task) if task.kind == "perplexity" else _measure_classes(network, model, task)
        )
    return Score(
        task=task.task,
        metric=metric,
        score=score,
        num_rows=num_rows,
        elapsed_seconds=time.perf_counter() - begun,
    )


def _load(model: str, task: "Task", head: str | None, head_from: str | None, device: str) -> "PreTrainedModel":
    if head is not None:
        return load.place(heads.load_task_model(model, head), device)
    if head_from is not None:
        return load.place(heads.load_with_head(model, head_from), device)
    return load.load_language_model(model, device) if task.kind == "perplexity" else load.load_classifier(model, device)


def _measure_text(network: "PreTrainedModel", model: str, task: "Task") -> tuple[str, float, int]:
    where = f"evaluate.{task.task}"
    texts = open_rows(task).columns([task.text], task.limit)[task.text]
    rows = tokenise(load.load_tokenizer(model), network.config, texts, None, task.max_length, where)
    total, num_tokens = 0.0, 0
    for numbers in rows.longest_first(task.batch_size):
        inputs = rows.pad(numbers, str(network.device))
        logits = _logits(network, inputs)
        if logits.ndim != 3:
            raise CheckpointError(f"{where}: {model} is a {type(network).__name__}; a language model is expected")
        # Row by row: a copy of all logits in float32 could be several times the model.
        for row_logits, row_ids, number in zip(logits, inputs["input_ids"], numbers, strict=True):
            last = rows.num_tokens(number)
            total += float(
                torch.nn.functional.cross_entropy(row_logits[: last - 1].float(), row_ids[1:last], reduction="sum")
            )
            num_tokens += last - 1
    if num_tokens == 0:
        raise RecipeError(f"{where}: {task.data}: no row has two tokens; there is nothing to predict")
    return "perplexity", perplexity(total, num_tokens), len(texts)


def _measure_classes(network: "PreTrainedModel", model: str, task: "Task") -> tuple[str, float, int]:
    images = load.reads_images(network)
    inputs = [task.image] if images else [name for name in (task.text, task.text_pair) if name is not None]
    columns = open_rows(task).columns([*inputs, task.label], task.limit)
    predict = _predict_images if images else _predict_texts
    num_classes, predictions = predict(network, model, task, [columns[name] for name in inputs])
    labels = _class_numbers(columns[task.label], num_classes, network.config.label2id, task)
    return task.metric, score_classes(task.metric, labels, predictions), len(labels)


def _predict_texts(
    network: "PreTrainedModel", model: str, task: "Task", columns: Sequence[Sequence[Any]]
) -> tuple[int, list[int]]:
    """The number of classes, and each row's class."""
    where = f"evaluate.{task.task}"
    texts, pairs = columns[0], columns[1] if len(columns) > 1 else None
    rows = tokenise(load.load_tokenizer(model), network.config, texts, pairs, task.max_length, where)
    predictions = [0] * len(texts)
    num_classes = 0
    for numbers in rows.longest_first(task.batch_size):
        logits = _class_logits(network, rows.pad(numbers, str(network.device)), model, where)
        num_classes = logits.shape[1]
        for number, prediction in zip(numbers, logits.argmax(-1).tolist(), strict=True):
            predictions[number] = prediction
    return num_classes, predictions


def _predict_images(
    network: "PreTrainedModel", model: str, task: "Task", columns: Sequence[Sequence[Any]]
) -> tuple[int, list[int]]:
    """The number of classes, and each row's class."""
    where = f"evaluate.{task.task}"
    place = f"{where}: {task.data}: column {task.image!r}"
    processor = load.load_image_processor(model)
    num_channels = getattr(network.config, "num_channels", 3)
    (cells,) = columns
    predictions: list[int] = []
    num_classes = 0
    for first in range(0, len(cells), task.batch_size):
        pixels = to_pixels(processor, cells[first : first + task.batch_size], num_channels, place, first)
        inputs = {"pixel_values": pixels.to(device=network.device, dtype=network.dtype)}
        logits = _class_logits(network, inputs, model, where)
        num_classes = logits.shape[1]
        predictions += logits.argmax(-1).tolist()
    return num_classes, predictions


def _class_logits(network: "PreTrainedModel", inputs: dict[str, Tensor], model: str, where: str) -> Tensor:
    """The model's output, (B, K). Raises CheckpointError if it does not classify."""
    logits = _logits(network, inputs)
    if logits.ndim != 2 or logits.shape[1] < 2:
        raise CheckpointError(
            f"{where}: {model} is a {type(network).__name__} with outputs {tuple(logits.shape)}; a classifier "
            f"with two or more classes is expected, or the name of the expert whose head it takes"
        )
    return logits


def _logits(network: "PreTrainedModel", inputs: dict[str, Tensor]) -> Tensor:
    """The model's output, (B, T, V) or (B, K)."""
    output = network(**inputs)
    if not hasattr(output, "logits"):
        raise CheckpointError(f"{type(network).__name__} has no head; name the expert whose head it takes")
    logits: Tensor = output.logits
    return logits


def _class_numbers(labels: Sequence[int | str], num_classes: int, numbers: dict[str, int], task: "Task") -> list[int]:
    """Labels as class numbers: numbers as they are, names by the model's `label2id`."""
    found = []
    for row, label in enumerate(labels):
        where = f"evaluate.{task.task}: {task.data}: column {task.label!r}, row {row}"
        if isinstance(label, str):
            if label not in numbers:
                raise RecipeError(f"{where}: the model has no class {label!r}; {nearest(label, numbers)}")
            found.append(int(numbers[label]))
        elif not isinstance(label, int) or not 0 <= label < num_classes:
            raise RecipeError(f"{where}: found {label!r}; a class of the model, 0 to {num_classes - 1}, is expected")
        else:
            found.append(int(label))
    return found
