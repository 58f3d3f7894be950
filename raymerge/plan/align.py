"""Decide whose vocabulary the output has, and align the rows of embeddings to it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from raymerge.checkpoint.index import Checkpoint
from raymerge.errors import VocabularyMismatch
from raymerge.models import families, vocabulary
from raymerge.models.vocabulary import RowRun, Vocabulary
from raymerge.plan.naming import Names, head_module
from raymerge.plan.schema import Tokenizer
from raymerge.recipe.schema import Recipe


@dataclass(frozen=True, kw_only=True, slots=True)
class Alignment:
    """The output's vocabulary: the embeddings it shapes (frame names), its rows, and whose it is."""

    embeddings: frozenset[str]
    tokens: tuple[str | None, ...]
    vocabularies: Mapping[str, Vocabulary]
    recipe: Recipe
    tokenizer: Tokenizer
    _found: dict[tuple[str, ...], dict[str, tuple[RowRun, ...]]] = field(default_factory=dict)

    @property
    def num_rows(self) -> int:
        return len(self.tokens)

    def rows(self, members: tuple[str, ...], reference: str) -> dict[str, tuple[RowRun, ...]]:
        """Row runs per model of `members`, whose order numbers the parts of the runs."""
        if members not in self._found:
            known = [self.vocabularies[name] for name in members]
            chosen = {
                token: vocabulary.choose(
                    token,
                    None if rule.model is None else members.index(rule.model),
                    known,
                    rule.token,
                    rule.token_id,
                    rule.force,
                )
                for token, rule in self.recipe.output.tokens.items()
                if rule.model is None or rule.model in members
            }
            runs = vocabulary.align_rows(self.tokens, known, members.index(reference), chosen)
            self._found[members] = dict(zip(members, runs, strict=True))
        return self._found[members]


def align(
    recipe: Recipe,
    checkpoints: Mapping[str, Checkpoint],
    names: Mapping[str, Names],
    frame: str,
) -> Alignment | None:
    """The alignment a recipe asks for; None if rows are merged by position.

    Raises VocabularyMismatch if embeddings differ in size, or tokens in their ids, and the recipe does
    not say what to do.
    """
    wanted = recipe.output.tokenizer
    differing = _differing_embeddings(checkpoints, names, frame)
    if wanted is None:
        if differing:
            raise VocabularyMismatch(_explain_sizes(checkpoints, names, frame, differing))
        _check_ids(recipe, checkpoints, frame)
        return None
    embeddings = _embedding_names(checkpoints[frame])
    if not embeddings:
        raise VocabularyMismatch(f"output.tokenizer: {checkpoints[frame].location} has no embeddings of tokens")
    vocabularies = {
        name: Vocabulary(
            vocabulary.read_vocabulary(checkpoint.location, checkpoint.location.files()),
            _num_rows(checkpoint, names[name], embeddings),
        )
        for name, checkpoint in checkpoints.items()
    }
    owner = frame if wanted in ("base", "union") else wanted
    position = list(checkpoints).index(owner)
    ids = dict(vocabularies[owner].ids)
    added: tuple[str, ...] = ()
    if wanted == "union":
        ordered = [vocabularies[owner], *(v for name, v in vocabularies.items() if name != owner)]
        missing = vocabulary.union_tokens([v.ids for v in ordered])
        missing += [token for token in recipe.output.tokens if token not in ids and token not in missing]
        first = max(ids.values(), default=-1) + 1
        ids.update((token, first + i) for i, token in enumerate(missing))
        added = tuple(missing)
    tokens = _rows_of(ids, recipe.output.pad_to_multiple_of, vocabularies[owner].num_rows)
    return Alignment(
        embeddings=frozenset(embeddings),
        tokens=tokens,
        vocabularies=vocabularies,
        recipe=recipe,
        tokenizer=Tokenizer(model=position, added=added),
    )


def _rows_of(ids: Mapping[str, int], multiple: int | None, owner_rows: int) -> tuple[str | None, ...]:
    """The token of each output row. Without a multiple, the rows of the vocabulary's owner are all kept."""
    needed = max(ids.values(), default=-1) + 1
    count = max(needed, owner_rows) if multiple is None else -(-needed // multiple) * multiple
    rows: list[str | None] = [None] * count
    for token, position in ids.items():
        rows[position] = token
    return tuple(rows)


def _embedding_names(frame: Checkpoint) -> tuple[str, ...]:
    """The frame's tensors with one row per token: embeddings of input and output, and the output's bias."""
    found = families.skeleton(frame.config)
    names = [name for name in (found.input_embedding, *found.output_embeddings) if name]
    prefix = families.base_model_prefix(frame.config)
    if prefix:
        names += [name.removeprefix(f"{prefix}.") for name in names] + [f"{prefix}.{name}" for name in names]
    listed = [name for name in dict.fromkeys(names) if name in frame.tensors]
    if not listed:
        return ()
    # A bias of the output may stand beside its matrix (`cls.predictions.bias`).
    rows = frame.tensors[listed[0]][1].shape[0]
    modules = {head_module(name) for name in found.output_embeddings}
    biases = [
        name
        for name, (_, entry) in frame.tensors.items()
        if entry.shape == (rows,) and head_module(name) in modules and name not in listed
    ]
    return (*listed, *biases)


def _num_rows(checkpoint: Checkpoint, names: Names, embeddings: Sequence[str]) -> int:
    for name in embeddings:
        if name in names.own:
            return checkpoint.tensors[names.own[name]][1].shape[0]
    raise VocabularyMismatch(f"{checkpoint.location}: no tensor {embeddings[0]}; its rows cannot be aligned")


def _differing_embeddings(checkpoints: Mapping[str, Checkpoint], names: Mapping[str, Names], frame: str) -> list[str]:
    """Embeddings whose number of rows is not the same in all models (frame names)."""
    tensors = checkpoints[frame].tensors
    suspects = {
        name
        for model, checkpoint in checkpoints.items()
        for name, own in names[model].own.items()
        if (theirs := checkpoint.tensors[own][1].shape) != (ours := tensors[name][1].shape) and theirs[:1] != ours[:1]
    }
    # The model class is asked only if something differs: importing transformers takes seconds.
    if not suspects or not any("vocab_size" in c.config for c in checkpoints.values()):
        return []
    return [name for name in _embedding_names(checkpoints[frame]) if name in suspects]


def _explain_sizes(
    checkpoints: Mapping[str, Checkpoint], names: Mapping[str, Names], frame: str, differing: Sequence[str]
) -> str:
    name = differing[0]
    sizes = [
        f"{model!r} has {checkpoint.tensors[names[model].own[name]][1].shape}"
        for model, checkpoint in checkpoints.items()
        if name in names[model].own
    ]
    return f"{name}: {', '.join(sizes)}; set output.tokenizer: base, union, or an expert's name"


def _check_ids(recipe: Recipe, checkpoints: Mapping[str, Checkpoint], frame: str) -> None:
    """Refuse models of equal size whose tokens have other ids: their rows do not mean the same."""
    if recipe.foreign:
        return  # mergekit merges by position without looking
    ours: dict[str, int] | None = None
    origin = checkpoints[frame]
    own_text = _tokenizer_text(origin)
    for name, checkpoint in checkpoints.items():
        text = _tokenizer_text(checkpoint)
        if name == frame or not own_text or not text or text == own_text:
            continue
        if ours is None:
            ours = vocabulary.read_vocabulary(origin.location, {"tokenizer.json": 0})
        theirs = vocabulary.read_vocabulary(checkpoint.location, {"tokenizer.json": 0})
        moved = next((token for token, number in theirs.items() if ours.get(token, number) != number), None)
        if moved is not None:
            raise VocabularyMismatch(
                f"token {moved!r}: id {ours[moved]} in {frame!r}, {theirs[moved]} in {name!r}; their embedding "
                f"rows do not mean the same: set output.tokenizer: base, union, or an expert's name"
            )


def _tokenizer_text(checkpoint: Checkpoint) -> bytes | None:
    if "tokenizer.json" not in checkpoint.location.files():
        return None
    return checkpoint.location.local_path("tokenizer.json").read_bytes()
