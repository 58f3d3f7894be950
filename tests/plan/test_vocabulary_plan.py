"""Checkpoints with different vocabularies: refused, or merged row by row as a naive computation says."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import load, make_bert, make_llama, recipe, save_tokenizer, words
from torch import Tensor

from raymerge import api
from raymerge.errors import RecipeError, VocabularyMismatch
from raymerge.plan import execute

WORDS = words(12)
ROWS = 12
# Token lists: base; math adds two; code permutes and lacks w8; chat is padded by position.
MATH = [*WORDS, "<tool>", "<think>"]
CODE = [*WORDS[:3], *reversed(WORDS[3:11]), "<fim>", "<tool>"]
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vocabulary")
    tied = request.param
    make_llama(folder / "base", 0, rows=ROWS, tokens=WORDS, tied=tied)
    make_llama(folder / "math", 1, base_seed=1, rows=16, tokens=MATH, tied=tied)  # two padding rows
    make_llama(folder / "code", 2, base_seed=2, rows=13, tokens=CODE, tied=tied)
    return folder


def naive(token: str | None, position: int, own: str, models: dict[str, tuple[list[str], Tensor]]) -> Tensor:
    """The row of a token for one model: its own, else the base's, else the mean of those that have it."""

    def row(name: str) -> Tensor | None:
        listed, matrix = models[name]
        place = position if token is None else listed.index(token) if token in listed else None
        return None if place is None or place >= len(matrix) else matrix[place]

    for name in (own, "base"):
        if (found := row(name)) is not None:
            return found
    having = [found for name in models if (found := row(name)) is not None]
    return torch.stack(having).mean(0) if having else torch.zeros(models[own][1].shape[1])


def expected(family: Path, name: str, tokens: list[str | None]) -> Tensor:
    lists = {"base": WORDS, "math": MATH, "code": CODE}
    models = {model: (listed, load(family / model)[name]) for model, listed in lists.items()}
    aligned = {
        model: torch.stack([naive(token, position, model, models) for position, token in enumerate(tokens)])
        for model in models
    }
    # task arithmetic with coefficient 0.5
    return aligned["base"] + 0.5 * ((aligned["math"] - aligned["base"]) + (aligned["code"] - aligned["base"]))


def ask(family: Path, **output: Any) -> dict[str, Any]:
    return recipe(
        family / "base",
        family / "math",
        family / "code",
        method="task_arithmetic",
        settings={"coefficient": 0.5},
        output=output,
    )


UNION = [*WORDS, "<tool>", "<think>", "<fim>"]
CASES: list[tuple[dict[str, Any], list[str | None]]] = [
    ({"tokenizer": "base"}, list(WORDS)),
    ({"tokenizer": "math"}, [*MATH, None, None]),
    ({"tokenizer": "code"}, list(CODE)),
    ({"tokenizer": "union"}, list(UNION)),
    ({"tokenizer": "base", "pad_to_multiple_of": 8}, [*WORDS, None, None, None, None]),
    ({"tokenizer": "math", "pad_to_multiple_of": 1}, list(MATH)),
]


@pytest.mark.parametrize("chunk", [16, 100, 1 << 18])
@pytest.mark.parametrize(("output", "tokens"), CASES, ids=lambda case: str(case) if isinstance(case, dict) else "")
def test_rows_follow_their_tokens(
    family: Path,
    tmp_path: Path,
    output: dict[str, Any],
    tokens: list[str | None],
    chunk: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(execute, "CHUNK", chunk)
    api.merge(ask(family, **output), tmp_path / "out", local=True)
    found = load(tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["vocab_size"] == len(tokens)
    assert config["tie_word_embeddings"] is (HEAD not in found)
    for name in {EMBED, HEAD} & found.keys():
        wanted = expected(family, name, tokens)
        assert found[name].shape == wanted.shape
        for row, token in enumerate(tokens):
            torch.testing.assert_close(found[name][row], wanted[row], msg=f"{name}: {token}")


@pytest.mark.parametrize(("output", "tokens"), CASES[:4], ids=lambda case: str(case) if isinstance(case, dict) else "")
def test_the_tokenizer_fits_the_rows(
    family: Path, tmp_path: Path, output: dict[str, Any], tokens: list[str | None]
) -> None:
    transformers = pytest.importorskip("transformers")
    api.merge(ask(family, **output), tmp_path / "out", local=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert {token: i for i, token in enumerate(tokens) if token} == tokenizer.get_vocab()
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.get_input_embeddings().num_embeddings == len(tokens)
    tied = model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert tied is model.config.tie_word_embeddings


def test_rows_may_be_chosen_by_hand(family: Path, tmp_path: Path) -> None:
    output = {
        "tokenizer": "union",
        "tokens": {
            "<tool>": {"model": "code", "force": True},
            "<think>": {},
            "w5": {"model": "math", "token": "w6", "force": True},
            "<new>": {"model": "base", "token_id": 3},
        },
    }
    api.merge(ask(family, **output), tmp_path / "out", local=True)
    found, code, math, base = (
        load(folder)[EMBED] for folder in (tmp_path / "out", *(family / n for n in ("code", "math", "base")))
    )
    rows = {token: found[i] for i, token in enumerate([*UNION, "<new>"])}
    assert len(found) == len(UNION) + 1
    # The same row for all: task vectors of zero, so the row itself comes out.
    torch.testing.assert_close(rows["<tool>"], code[CODE.index("<tool>")])
    torch.testing.assert_close(rows["w5"], math[MATH.index("w6")])
    torch.testing.assert_close(rows["<new>"], base[3])
    # Not forced: math keeps its own, the others get zeros.
    torch.testing.assert_close(rows["<think>"], 0.5 * math[MATH.index("<think>")])


def test_sizes_that_differ_need_a_word(family: Path) -> None:
    with pytest.raises(
        VocabularyMismatch,
        match=r"'base' has \(12, 16\), 'math' has \(16, 16\), 'code' has \(13, 16\); set output.tokenizer: base, union",
    ):
        api.plan(ask(family))


def test_moved_ids_of_equal_size_need_a_word(tmp_path: Path) -> None:
    make_llama(tmp_path / "base", 0, rows=ROWS, tokens=WORDS)
    moved = [*WORDS[:-2], WORDS[-1], WORDS[-2]]
    make_llama(tmp_path / "moved", 1, rows=ROWS, tokens=moved)
    both = recipe(tmp_path / "base", tmp_path / "moved", method="task_arithmetic", settings={"coefficient": 1.0})
    with pytest.raises(VocabularyMismatch, match=r"token 'w\d': id 1\d in 'base', 1\d in 'moved'; their embedding"):
        api.plan(both)
    api.merge({**both, "output": {"tokenizer": "base"}}, tmp_path / "out", local=True)
    found, own = load(tmp_path / "out")[EMBED], load(tmp_path / "moved")[EMBED]
    torch.testing.assert_close(found, own[[*range(ROWS - 2), ROWS - 1, ROWS - 2]])


def test_added_tokens_alone_are_no_quarrel(tmp_path: Path) -> None:
    """An expert that used padding rows of the base for new tokens: the rows' places are the same."""
    make_llama(tmp_path / "base", 0, rows=16, tokens=WORDS)
    make_llama(tmp_path / "tool", 1, rows=16, tokens=WORDS)
    save_tokenizer(tmp_path / "tool", {token: i for i, token in enumerate(WORDS)}, added=["<tool>"])
    both = recipe(tmp_path / "base", tmp_path / "tool")
    assert api.plan(both).config["vocab_size"] == 16
    union = api.plan({**both, "output": {"tokenizer": "union"}})
    assert union.tokenizer.added == ("<tool>",)
    assert union.config["vocab_size"] == 16


def test_bert_rows_under_another_prefix(tmp_path: Path) -> None:
    make_bert(tmp_path / "base", 0, rows=12)
    make_bert(tmp_path / "two", 1, rows=14, with_head=2)
    both = recipe(tmp_path / "base", tmp_path / "two", output={"tokenizer": "union"})
    api.merge(both, tmp_path / "out", local=True)
    found = load(tmp_path / "out")["embeddings.word_embeddings.weight"]
    torch.testing.assert_close(found, load(tmp_path / "two")["bert.embeddings.word_embeddings.weight"])


def test_models_without_embeddings_or_tokenizer(tmp_path: Path, family: Path) -> None:
    make_llama(tmp_path / "mute", 1, rows=ROWS)
    (tmp_path / "mute" / "tokenizer.json").unlink()
    (tmp_path / "mute" / "tokenizer_config.json").unlink()
    with pytest.raises(Exception, match="no tokenizer; rows cannot be aligned by token"):
        api.plan(recipe(family / "base", tmp_path / "mute", output={"tokenizer": "union"}))
    with pytest.raises(RecipeError, match="output.tokens.<x>: its model has no token '<x>'"):
        api.plan(ask(family, tokenizer="union", tokens={"<x>": {"model": "math"}}))
