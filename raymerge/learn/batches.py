"""Tokenised rows as batches: rows of about the same length together, so that little is padding.

Shapes: B rows, T tokens of the longest row in the batch.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from raymerge.errors import RecipeError


@dataclass(frozen=True, slots=True)
class TokenRows:
    """Token ids, and what else the tokenizer gives, for each row; no padding yet."""

    columns: Mapping[str, Sequence[Sequence[int]]]
    pad_id: int

    @staticmethod
    def of_ids(ids: Sequence[Sequence[int]], tokenizer: Any, config: Any) -> "TokenRows":
        """Rows that are token ids already."""
        pad_id = _padding_token(tokenizer, config.get_text_config())
        return TokenRows({"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids]}, pad_id)

    def num_tokens(self, row: int) -> int:
        return len(self.columns["input_ids"][row])

    def longest_first(self, batch_size: int) -> Iterator[list[int]]:
        """Numbers of rows, batch by batch; the longest come first, so that memory runs out at once or never."""
        order = sorted(range(len(self.columns["input_ids"])), key=lambda row: -self.num_tokens(row))
        for first in range(0, len(order), batch_size):
            yield order[first : first + batch_size]

    def pad(self, rows: Sequence[int], device: str) -> dict[str, Tensor]:
        """The inputs of a model, (B, T) each: padded on the right, and masked there."""
        padded = {}
        for name, values in self.columns.items():
            filler = self.pad_id if name == "input_ids" else 0
            tensors = [torch.tensor(values[row]) for row in rows]
            padded[name] = torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=filler).to(device)
        return padded


def tokenise(
    tokenizer: Any,
    config: Any,
    texts: Sequence[str],
    pairs: Sequence[str] | None,
    max_length: int,
    where: str,
    numbers: Sequence[int],
) -> TokenRows:
    """Cut texts into at most `max_length` tokens each, special tokens included; `numbers` are their rows'.

    Sets the config's padding token if it has none. Raises RecipeError if a row is empty, or is longer
    than the model reads.
    """
    columns = tokenizer(list(texts), list(pairs) if pairs is not None else None, truncation=True, max_length=max_length)
    # A row's own length is its mask; some tokenizers leave it out.
    ids = columns["input_ids"]
    inputs = {name: columns[name] for name in ("input_ids", "token_type_ids") if name in columns}
    inputs["attention_mask"] = [[1] * len(row) for row in ids]
    empty = next((row for row, tokens in enumerate(ids) if not tokens), None)
    if empty is not None:
        raise RecipeError(f"{where}: row {numbers[empty]} has no tokens: {texts[empty]!r}; a text is expected")
    text_config = config.get_text_config()
    limit = getattr(text_config, "max_position_embeddings", None)
    longest = max(map(len, ids))
    if limit is not None and longest > limit:
        raise RecipeError(f"{where}: max_length: a row has {longest} tokens, the model reads {limit}; set {limit}")
    pad_id = _padding_token(tokenizer, text_config)
    # Classifiers over the last token find it by what is not padding.
    if text_config.pad_token_id is None:
        text_config.pad_token_id = pad_id
    return TokenRows(inputs, pad_id)


def _padding_token(tokenizer: Any, config: Any) -> int:
    for source in (config, tokenizer):
        if getattr(source, "pad_token_id", None) is not None:
            return int(source.pad_token_id)
    # Masked anyway: any token will do.
    return int(getattr(tokenizer, "eos_token_id", None) or 0)
