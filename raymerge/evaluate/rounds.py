"""A task's rows as a model reads them, and a model's way through them, part by part.

Shapes: B rows, T tokens, K classes, V entries of the vocabulary.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from raymerge.errors import CheckpointError, RecipeError, nearest
from raymerge.evaluate.metrics import perplexity, score_classes
from raymerge.evaluate.rows import open_rows
from raymerge.learn.batches import tokenise
from raymerge.learn.images import to_pixels
from raymerge.models import load
from raymerge.ops.randomness import seeded

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from raymerge.recipe.schema import Task


Batch = tuple[Mapping[str, Tensor], Sequence[int]]
"""Inputs of a model, on the CPU, and the numbers of their rows."""


class Batches(Sequence[Batch]):
    """Batches that are made when they are asked for: decoded images are larger than their files."""

    def __init__(self, rows: Sequence[Sequence[int]], read: Callable[[Sequence[int]], Mapping[str, Tensor]]) -> None:
        self._rows = rows
        self._read = read

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, number: Any) -> Any:
        rows = self._rows[number]
        return self._read(rows), rows


@dataclass(frozen=True, kw_only=True, slots=True)
class Prepared:
    """The rows of a task in batches, and all labels (none for perplexity)."""

    task: "Task"
    batches: Sequence[Batch]
    labels: tuple[int | str, ...]
    num_rows: int
    pad_id: int | None

    @property
    def where(self) -> str:
        return f"evaluate.{self.task.task}"

    def held(self, seed: int) -> "Prepared":
        """The same with all batches in memory and in a random order, so that any share of them is a fair sample."""
        order = torch.randperm(len(self.batches), generator=seeded(seed, self.task.task)).tolist()
        return replace(self, batches=tuple(self.batches[number] for number in order))


def prepare(task: "Task", model: str, network: "PreTrainedModel") -> Prepared:
    """Read and tokenise the rows of a task, with what the folder or hub id `model` holds for it.

    Raises RecipeError if the data does not fit, CheckpointError without a tokenizer or image processor.
    """
    images = task.kind == "classification" and load.reads_images(network)
    inputs = [task.image] if images else [name for name in (task.text, task.text_pair) if name is not None]
    if task.kind == "perplexity":
        inputs = [task.text]
    wanted = inputs if task.kind == "perplexity" else [*inputs, task.label]
    columns = open_rows(task).columns(wanted, task.limit)
    found = [columns[name] for name in inputs]
    batches, pad_id = _images(task, model, network, found[0]) if images else _texts(task, model, network, found)
    return Prepared(
        task=task,
        batches=batches,
        labels=() if task.kind == "perplexity" else tuple(columns[task.label]),
        num_rows=len(found[0]),
        pad_id=pad_id,
    )


def _texts(
    task: "Task", model: str, network: "PreTrainedModel", columns: Sequence[Sequence[Any]]
) -> tuple[Batches, int | None]:
    texts, pairs = columns[0], columns[1] if len(columns) > 1 else None
    where = f"evaluate.{task.task}"
    rows = tokenise(load.load_tokenizer(model), network.config, texts, pairs, task.max_length, where, range(len(texts)))
    return Batches(list(rows.longest_first(task.batch_size)), lambda numbers: rows.pad(numbers, "cpu")), rows.pad_id


def _images(task: "Task", model: str, network: "PreTrainedModel", cells: Sequence[Any]) -> tuple[Batches, int | None]:
    place = f"evaluate.{task.task}: {task.data}: column {task.image!r}"
    processor, num_channels = load.load_image_processor(model), getattr(network.config, "num_channels", 3)

    def read(numbers: Sequence[int]) -> dict[str, Tensor]:
        part = [cells[number] for number in numbers]
        return {"pixel_values": to_pixels(processor, part, num_channels, place, numbers)}

    rows = [range(len(cells))[first : first + task.batch_size] for first in range(0, len(cells), task.batch_size)]
    return Batches(rows, read), None


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What a model gave on the rows it has seen.

    `entropy` is the mean of its predictions' entropies in nats (of each token's, for perplexity); `predictions` are
    classes by row.
    """

    metric: str
    score: float
    num_rows: int
    entropy: float
    predictions: Mapping[int, int]


class Round:
    """One model on its way through one task's batches."""

    def __init__(self, network: "PreTrainedModel", prepared: Prepared) -> None:
        self._network = network
        self._prepared = prepared
        self._next = 0
        self._predictions: dict[int, int] = {}
        self._num_classes = 0
        self._nll, self._entropy, self._count, self._num_rows = 0.0, 0.0, 0, 0
        # Classifiers over the last token find it by what is not padding.
        text_config = network.config.get_text_config()
        if prepared.pad_id is not None and text_config.pad_token_id is None:
            text_config.pad_token_id = prepared.pad_id

    @torch.inference_mode()
    def until(self, share: float) -> Outcome:
        """Go on to the given share of the batches. Raises RecipeError, CheckpointError."""
        end = math.ceil(share * len(self._prepared.batches))
        for at in range(self._next, end):
            inputs, numbers = self._prepared.batches[at]
            placed = {name: self._placed(value) for name, value in inputs.items()}
            self._see(placed, _logits(self._network, placed), numbers)
            self._num_rows += len(numbers)
        self._next = max(self._next, end)
        return self._outcome()

    def _placed(self, value: Tensor) -> Tensor:
        dtype = self._network.dtype if value.is_floating_point() else None
        return value.to(device=self._network.device, dtype=dtype)

    def _see(self, inputs: Mapping[str, Tensor], logits: Tensor, numbers: Sequence[int]) -> None:
        if self._prepared.task.kind == "perplexity":
            self._see_tokens(inputs, logits)
            return
        if logits.ndim != 2 or logits.shape[1] < 2:
            raise CheckpointError(
                f"{self._prepared.where}: a {type(self._network).__name__} has outputs {tuple(logits.shape)}; a "
                f"classifier with two or more classes is expected, or the name of the expert whose head it takes"
            )
        self._num_classes = logits.shape[1]
        self._entropy += float(_entropy(logits).sum())
        self._count += len(numbers)
        self._predictions.update(zip(numbers, logits.argmax(-1).tolist(), strict=True))

    def _see_tokens(self, inputs: Mapping[str, Tensor], logits: Tensor) -> None:
        if logits.ndim != 3:
            raise CheckpointError(
                f"{self._prepared.where}: found a {type(self._network).__name__}; a language model is expected"
            )
        # Row by row: a copy of all logits in float32 could be several times the model.
        for row_logits, row_ids, mask in zip(logits, inputs["input_ids"], inputs["attention_mask"], strict=True):
            last = int(mask.sum())
            self._nll += float(
                torch.nn.functional.cross_entropy(row_logits[: last - 1].float(), row_ids[1:last], reduction="sum")
            )
            self._entropy += float(_entropy(row_logits[: last - 1]).sum())
            self._count += last - 1

    def _outcome(self) -> Outcome:
        task = self._prepared.task
        if self._count == 0:
            raise RecipeError(
                f"{self._prepared.where}: {task.data}: no row has two tokens; there is nothing to predict"
            )
        if task.kind == "perplexity":
            metric, score = "perplexity", perplexity(self._nll, self._count)
        else:
            rows = sorted(self._predictions)
            labels = [self._class_number(row) for row in rows]
            metric, score = task.metric, score_classes(task.metric, labels, [self._predictions[row] for row in rows])
        return Outcome(
            metric=metric,
            score=score,
            num_rows=self._num_rows,
            entropy=self._entropy / self._count,
            predictions=dict(self._predictions),
        )

    def _class_number(self, row: int) -> int:
        """A label as the number of a class: numbers as they are, names by the model's `label2id`."""
        task, label = self._prepared.task, self._prepared.labels[row]
        where = f"{self._prepared.where}: {task.data}: column {task.label!r}, row {row}"
        if isinstance(label, str):
            numbers = self._network.config.label2id
            if label not in numbers:
                raise RecipeError(f"{where}: the model has no class {label!r}; {nearest(label, numbers)}")
            return int(numbers[label])
        if not isinstance(label, int) or not 0 <= label < self._num_classes:
            raise RecipeError(
                f"{where}: found {label!r}; a class of the model, 0 to {self._num_classes - 1}, is expected"
            )
        return int(label)


def _logits(network: "PreTrainedModel", inputs: Mapping[str, Tensor]) -> Tensor:
    """The model's output, (B, T, V) or (B, K)."""
    output = network(**inputs)
    if not hasattr(output, "logits"):
        raise CheckpointError(f"{type(network).__name__} has no head; name the expert whose head it takes")
    logits: Tensor = output.logits
    return logits


def _entropy(logits: Tensor) -> Tensor:
    """Entropy of the predictions in nats, without the last axis."""
    logs = logits.float().log_softmax(-1)
    return -(logs.exp() * logs).sum(-1)
