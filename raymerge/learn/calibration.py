"""Unlabelled samples of each expert, as batches of the model's inputs, for methods that learn.

A row is `messages` (put through the chat template), `input_ids`, `text` or an `image`: the first of these columns
that the file has. Which rows are taken depends on the recipe's seed and the expert's name alone.

Shapes: B rows, T tokens.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from raymerge.checkpoint.remote import is_remote
from raymerge.errors import RecipeError
from raymerge.learn.batches import TokenRows, tokenise
from raymerge.learn.images import to_pixels
from raymerge.learn.rows import Fits, Rows, is_image, is_list_of_integers, is_list_of_messages, is_text
from raymerge.ops.randomness import seeded

COLUMNS: Mapping[str, Fits] = {
    "messages": is_list_of_messages,
    "input_ids": is_list_of_integers,
    "text": is_text,
    "image": is_image,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Calibration:
    """The samples of an expert: its name, where they are, and which column is read."""

    expert: str
    data: str
    column: str
    fingerprint: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """How samples become inputs. `config` is the model's; tokenizer or image processor may be None."""

    config: Any
    tokenizer: Any
    image_processor: Any
    samples: int
    max_length: int
    batch_size: int
    seed: int


@dataclass(frozen=True, slots=True)
class Batch:
    """Inputs of the model for samples of one expert, by its number; B first in every shape."""

    expert: int
    inputs: Mapping[str, Tensor]

    @property
    def num_rows(self) -> int:
        return len(next(iter(self.inputs.values())))


def find_calibration(expert: str, data: str) -> Calibration:
    """Check an expert's calibration data; no model is loaded. Raises RecipeError."""
    rows = _rows(expert, data)
    column = next((name for name in COLUMNS if name in rows.schema.names), None)
    if column is None:
        raise rows.error(f"has no column {', '.join(COLUMNS)}; it has {', '.join(rows.schema.names)}")
    rows.require({column: COLUMNS[column]})
    rows.require_some()
    # Workers may stand in another folder.
    place = data if is_remote(data) else str(Path(data).expanduser().absolute())
    return Calibration(expert=expert, data=place, column=column, fingerprint=rows.fingerprint)


def read_batches(calibrations: Sequence[Calibration], reading: Reading) -> list[Batch]:
    """The batches of all experts, expert by expert, rows of about the same length together. Raises RecipeError."""
    found = []
    for number, calibration in enumerate(calibrations):
        cells = _rows(calibration.expert, calibration.data).columns([calibration.column])[calibration.column]
        chosen = {row: cells[row] for row in _choose(len(cells), calibration.expert, reading)}
        read = _read_images if calibration.column == "image" else _read_tokens
        found += [Batch(number, inputs) for inputs in read(chosen, calibration, reading)]
    return found


def _rows(expert: str, data: str) -> Rows:
    return Rows(data, f"experts.{expert}.calibration")


def _choose(count: int, expert: str, reading: Reading) -> list[int]:
    order = torch.randperm(count, generator=seeded(reading.seed, expert))
    chosen: list[int] = order[: reading.samples].tolist()
    return sorted(chosen)


def _read_tokens(cells: Mapping[int, Any], calibration: Calibration, reading: Reading) -> list[dict[str, Tensor]]:
    where = f"experts.{calibration.expert}.calibration"
    if calibration.column == "input_ids":
        ids = [list(cell)[: reading.max_length] for cell in cells.values()]
        rows = TokenRows.of_ids(ids, reading.tokenizer, reading.config)
    else:
        texts = list(cells.values())
        if calibration.column == "messages":
            texts = [_as_text(cell, reading.tokenizer, f"{where}: row {row}") for row, cell in cells.items()]
        rows = tokenise(reading.tokenizer, reading.config, texts, None, reading.max_length, where, list(cells))
    batches = [rows.pad(numbers, "cpu") for numbers in rows.longest_first(reading.batch_size)]
    if getattr(reading.config, "is_encoder_decoder", False):
        # Both halves read the sample.
        for batch in batches:
            batch |= {"decoder_input_ids": batch["input_ids"], "decoder_attention_mask": batch["attention_mask"]}
    return batches


def _as_text(messages: Any, tokenizer: Any, where: str) -> str:
    try:
        text: str = tokenizer.apply_chat_template(messages, tokenize=False)
    except Exception as problem:  # of Jinja, or of a template that refuses
        raise RecipeError(f"{where}: messages do not fit the chat template: {problem}") from None
    return text


def _read_images(cells: Mapping[int, Any], calibration: Calibration, reading: Reading) -> list[dict[str, Tensor]]:
    num_channels = getattr(reading.config, "num_channels", 3)
    place = f"experts.{calibration.expert}.calibration: {calibration.data}: column 'image'"
    numbers, size = list(cells), reading.batch_size
    batches = [numbers[first : first + size] for first in range(0, len(numbers), size)]
    return [
        {"pixel_values": to_pixels(reading.image_processor, [cells[row] for row in rows], num_channels, place, rows)}
        for rows in batches
    ]
