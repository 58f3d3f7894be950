"""Tiny checkpoints with a tokenizer, and files of rows, for the tests of evaluation."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *"abcdefghijklmnopqrstuvwxyz"]


def save_tokenizer(folder: Path, *, special: bool = True, pad: bool = True) -> Any:
    """Letters as words; `special` puts [CLS] and [SEP] around a text."""
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if special:
        core.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]",
            pair="[CLS] $A [SEP] $B:1 [SEP]:1",
            special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
        )
    names = {"unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"} | ({"pad_token": "[PAD]"} if pad else {})
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=core, **names)
    tokenizer.save_pretrained(folder)
    return tokenizer


def save_text_classifier(folder: Path, num_labels: int, seed: int = 2) -> None:
    torch.manual_seed(seed)
    config = transformers.BertConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=24,
        num_labels=num_labels,
        initializer_range=0.5,
    )
    transformers.BertForSequenceClassification(config).save_pretrained(folder)
    save_tokenizer(folder)


def texts(num_rows: int, seed: int = 0, longest: int = 20) -> list[str]:
    """Letters, 1 to `longest` of them a row."""
    generator = torch.Generator().manual_seed(seed)
    return [
        " ".join(
            WORDS[4 + i]
            for i in torch.randint(
                26, (int(torch.randint(1, longest + 1, (), generator=generator)),), generator=generator
            )
        )
        for _ in range(num_rows)
    ]


def write_jsonl(path: Path, columns: dict[str, list[Any]]) -> str:
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def write_parquet(path: Path, columns: dict[str, list[Any]]) -> str:
    import pyarrow as pa
    import pyarrow.parquet

    pyarrow.parquet.write_table(pa.table(columns), path)
    return str(path)


@pytest.fixture(scope="session")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("classifier")
    save_text_classifier(folder, 3)
    return folder
