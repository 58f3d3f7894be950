"""Align embedding rows by token, so that models with different vocabularies can be merged.

A token's row comes from the model itself where it has the token, else: from the base if that has it,
else from the mean of the models that do, else zeros (mergekit's rule).
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from raymerge.checkpoint.location import Location
from raymerge.errors import CheckpointError, RecipeError


@dataclass(frozen=True, slots=True)
class RowRun:
    """Consecutive rows of an aligned embedding: the mean of rows of some models; zeros if of none.

    `parts` has, for each model the rows come from, its number and the first row there.
    """

    first: int
    num_rows: int
    parts: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The tokens of one model, with their ids, and the number of rows of its embedding."""

    ids: Mapping[str, int]
    num_rows: int


def read_vocabulary(location: Location, files: Mapping[str, int]) -> dict[str, int]:
    """Token to id, added tokens included. Raises CheckpointError if the tokenizer cannot be read."""
    if "tokenizer.json" in files:
        try:
            found = json.loads(location.local_path("tokenizer.json").read_bytes())
            listed = found["model"]["vocab"]
            # Unigram models list [token, score] pairs; others map tokens to ids.
            ids = dict(listed) if isinstance(listed, dict) else {pair[0]: i for i, pair in enumerate(listed)}
            ids.update((token["content"], token["id"]) for token in found.get("added_tokens", ()))
            return ids
        except (ValueError, KeyError, TypeError) as problem:
            raise CheckpointError(f"{location}/tokenizer.json: damaged: {problem!r}") from None
    if not any(name.startswith(("tokenizer", "vocab", "spiece")) for name in files):
        raise CheckpointError(f"{location}: no tokenizer; rows cannot be aligned by token")
    return dict(load_tokenizer(location, files).get_vocab())


def load_tokenizer(location: Location, files: Mapping[str, int]) -> Any:
    """The tokenizer of a checkpoint, through transformers. Raises CheckpointError."""
    from transformers import AutoTokenizer

    try:
        # The hub's own cache is filled file by file, so its folder serves as a local one.
        folder = location.local_path("config.json").parent
        for name in files:
            if name.endswith((".json", ".txt", ".model")) and "safetensors" not in name:
                location.local_path(name)
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as problem:
        raise CheckpointError(f"{location}: its tokenizer cannot be loaded: {problem}") from None


def union_tokens(vocabularies: Sequence[Mapping[str, int]]) -> list[str]:
    """Tokens of the later vocabularies that the first does not have, in order of model and id."""
    known = set(vocabularies[0])
    added: dict[str, None] = {}
    for vocabulary in vocabularies[1:]:
        for token in sorted(vocabulary, key=vocabulary.__getitem__):
            if token not in known:
                added.setdefault(token)
    return list(added)


def extend_tokenizer(tokenizer: Any, tokens: Sequence[str], donors: Sequence[Any]) -> Any:
    """Add tokens to a tokenizer, as special where the first donor that has them says so."""
    from transformers import AddedToken

    special = {str(added): added.special for donor in reversed(donors) for added in donor.added_tokens_decoder.values()}
    tokenizer.add_tokens([AddedToken(t, special=special.get(t, False), normalized=False) for t in tokens])
    return tokenizer


@dataclass(frozen=True, slots=True)
class Choice:
    """An embedding row chosen by hand: the models and rows it is the mean of (none: zeros)."""

    parts: tuple[tuple[int, int], ...]
    force: bool


def align_rows(
    rows: Sequence[str | None],
    vocabularies: Sequence[Vocabulary],
    reference: int,
    chosen: Mapping[str, Choice],
) -> list[tuple[RowRun, ...]]:
    """For each model, where each row of the aligned embedding comes from.

    `rows` names the token of each output row (None: a padding row, kept by position); `reference` is
    the number of the base, whose row serves models that lack a token.
    """
    columns: list[list[tuple[tuple[int, int], ...]]] = [[] for _ in vocabularies]
    for position, token in enumerate(rows):
        own = [_own_row(vocabulary, token, position) for vocabulary in vocabularies]
        fallback = _fallback(own, reference)
        choice = chosen.get(token) if token is not None else None
        for model, row in enumerate(own):
            if choice is not None and (choice.force or row is None):
                columns[model].append(choice.parts)
            else:
                columns[model].append(((model, row),) if row is not None else fallback)
    return [_runs(column) for column in columns]


def _own_row(vocabulary: Vocabulary, token: str | None, position: int) -> int | None:
    row = position if token is None else vocabulary.ids.get(token)
    return row if row is not None and row < vocabulary.num_rows else None


def _fallback(own: Sequence[int | None], reference: int) -> tuple[tuple[int, int], ...]:
    having = tuple((model, row) for model, row in enumerate(own) if row is not None)
    if own[reference] is not None:
        return tuple(part for part in having if part[0] == reference)
    return having


def _runs(column: Sequence[tuple[tuple[int, int], ...]]) -> tuple[RowRun, ...]:
    """Join rows that continue each other."""
    runs: list[RowRun] = []
    for position, parts in enumerate(column):
        if runs:
            last = runs[-1]
            if parts == tuple((model, row + last.num_rows) for model, row in last.parts):
                runs[-1] = RowRun(last.first, last.num_rows + 1, last.parts)
                continue
        runs.append(RowRun(position, 1, parts))
    return tuple(runs)


def choose(
    token: str,
    model: int | None,
    vocabularies: Sequence[Vocabulary],
    other: str | None,
    token_id: int | None,
    force: bool,
) -> Choice:
    """A row chosen by hand for `token`: of model number `model` (None: zeros), its token `other` or `token_id`."""
    if model is None:
        return Choice((), force)
    vocabulary = vocabularies[model]
    row = token_id if token_id is not None else vocabulary.ids.get(other or token)
    if row is None or not 0 <= row < vocabulary.num_rows:
        raise RecipeError(
            f"output.tokens.{token}: its model has no token {other or token if token_id is None else token_id!r}"
        )
    return Choice(((model, row),), force)
