"""Samples of every kind become batches; which rows are taken depends on seed and expert alone."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tiny import make_llama

from raymerge.errors import RecipeError
from raymerge.learn.calibration import Batch, Reading, find_calibration, read_batches

TEMPLATE = (
    "{% for m in messages %}"
    "{% if m['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "{{ m['content'] }} {% endfor %}"
)


class Config(SimpleNamespace):
    def get_text_config(self) -> "Config":
        return self


def reading(folder: Path, **more: Any) -> Reading:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(
        make_llama(folder / "model", tokens=["<unk>", "<s>", "</s>", *(f"w{i}" for i in range(29))])
    )
    tokenizer.chat_template = TEMPLATE
    config = Config(pad_token_id=0, is_encoder_decoder=False)
    settings = {"samples": 8, "max_length": 6, "batch_size": 3, "seed": 0, **more}
    return Reading(config=config, tokenizer=tokenizer, image_processor=None, **settings)


def write(folder: Path, **columns: Any) -> str:
    pq.write_table(pa.table(columns), folder / "rows.parquet")
    return str(folder / "rows.parquet")


def rows_of(batches: list[Batch]) -> list[list[int]]:
    """Token ids of all rows, without padding."""
    return [
        ids[mask.bool()].tolist()
        for batch in batches
        for ids, mask in zip(batch.inputs["input_ids"], batch.inputs["attention_mask"], strict=True)
    ]


def test_messages_go_through_the_chat_template(tmp_path: Path) -> None:
    said = [[{"role": "user", "content": f"w{i}"}, {"role": "assistant", "content": f"w{i + 1} w2"}] for i in range(5)]
    data = write(tmp_path, messages=said)
    found = find_calibration("a", data)
    assert found.column == "messages"
    rows = rows_of(read_batches([found], reading(tmp_path)))
    assert sorted(rows) == [[i + 3, i + 4, 5] for i in range(5)]


def test_messages_that_do_not_fit(tmp_path: Path) -> None:
    said = [[{"role": "user", "content": f"w{i}"}] for i in range(20)]
    said[17] = [{"role": "system", "content": "w1"}]
    data = write(tmp_path, messages=said)
    some = reading(tmp_path, samples=20)
    with pytest.raises(RecipeError, match=r"calibration: row 17: messages do not fit the chat template: .*no system"):
        read_batches([find_calibration("a", data)], some)


def test_rows_are_chosen_by_seed_and_expert(tmp_path: Path) -> None:
    data = write(tmp_path, text=[f"w{i}" for i in range(28)])

    def chosen(expert: str, seed: int) -> list[list[int]]:
        return rows_of(read_batches([find_calibration(expert, data)], reading(tmp_path, seed=seed)))

    assert chosen("a", 0) == chosen("a", 0)
    assert len(chosen("a", 0)) == 8
    assert len({tuple(map(tuple, chosen(*key))) for key in (("a", 0), ("a", 1), ("b", 0))}) == 3


def test_rows_of_one_length_stand_together_and_long_ones_are_cut(tmp_path: Path) -> None:
    data = write(tmp_path, text=[" ".join(["w1"] * length) for length in (1, 9, 2, 8, 3, 1)])
    batches = read_batches([find_calibration("a", data)], reading(tmp_path, samples=6))
    assert [tuple(batch.inputs["input_ids"].shape) for batch in batches] == [(3, 6), (3, 2)]
    assert [batch.inputs["attention_mask"].sum().item() for batch in batches] == [6 + 6 + 3, 2 + 1 + 1]


def test_experts_keep_apart(tmp_path: Path) -> None:
    data = write(tmp_path, text=[f"w{i}" for i in range(7)])
    batches = read_batches([find_calibration("a", data), find_calibration("b", data)], reading(tmp_path))
    assert [batch.expert for batch in batches] == [0, 0, 0, 1, 1, 1]
    assert all(torch.equal(b.inputs["attention_mask"], torch.ones_like(b.inputs["input_ids"])) for b in batches)


def test_images_of_different_sizes(tmp_path: Path) -> None:
    from transformers import ViTImageProcessor

    data = write(tmp_path, image=[[[0, 1], [2, 3]], [[0, 1, 2], [3, 4, 5]]])
    processor = ViTImageProcessor(do_resize=False, image_mean=[0.5], image_std=[0.5])
    config = Config(num_channels=1)
    asked = Reading(
        config=config, tokenizer=None, image_processor=processor, samples=8, max_length=6, batch_size=3, seed=0
    )
    with pytest.raises(RecipeError, match="column 'image': the model's image processor refuses images of 2 x 2, 3 x 2"):
        read_batches([find_calibration("a", data)], asked)
