"""Reading data files: what is found, and what is said when it is not."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from raymerge.errors import RecipeError
from raymerge.evaluate.rows import check_task, open_rows
from raymerge.learn.images import decode_image
from raymerge.recipe.schema import Task

from .conftest import write_jsonl, write_parquet

ROWS: dict[str, list[Any]] = {"text": ["a b", "c", "d"], "label": [0, 1, 0]}
WRITERS = {"parquet": write_parquet, "jsonl": write_jsonl}


def task(data: str, **settings: Any) -> Task:
    return Task(**{"task": "trec", "kind": "classification", "data": data, **settings})


@pytest.mark.parametrize("suffix", WRITERS)
def test_columns_come_back_in_order(tmp_path: Path, suffix: str) -> None:
    data = WRITERS[suffix](tmp_path / f"rows.{suffix}", ROWS)
    check_task(task(data))
    assert open_rows(task(data)).columns(["label", "text"]) == ROWS
    assert open_rows(task(data)).columns(["text"], 2) == {"text": ["a b", "c"]}


@pytest.mark.parametrize("limit", [1, 1024, 1025, 5000])
def test_limit_crosses_batches(tmp_path: Path, limit: int) -> None:
    data = write_parquet(tmp_path / "rows.parquet", {"label": list(range(3000))})
    assert open_rows(task(data)).columns(["label"], limit)["label"] == list(range(min(limit, 3000)))


@pytest.mark.parametrize("suffix", WRITERS)
@pytest.mark.parametrize(
    "settings, message",
    [
        ({"label": "lable"}, "evaluate.trec: .*rows.* has no column 'lable'; did you mean 'label'"),
        ({"text": "label"}, "column 'label' holds int64; text is expected"),
        ({"text_pair": "texts"}, "no column 'texts'"),
        ({"text": "body"}, "no column 'body' and no column 'image'; it has text, label"),
        ({"kind": "perplexity", "text": "body"}, "no column 'body'"),
    ],
)
def test_wrong_columns(tmp_path: Path, suffix: str, settings: dict[str, str], message: str) -> None:
    data = WRITERS[suffix](tmp_path / f"rows.{suffix}", ROWS)
    with pytest.raises(RecipeError, match=message):
        check_task(task(data, **settings))


@pytest.mark.parametrize("suffix", WRITERS)
def test_empty_file(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"rows.{suffix}"
    if suffix == "jsonl":
        path.touch()
    else:
        import pyarrow as pa

        write_parquet(path, {"text": pa.array([], pa.string()), "label": pa.array([], pa.int64())})  # type: ignore[dict-item]
    with pytest.raises(RecipeError, match="has no rows"):
        check_task(task(str(path)))
    with pytest.raises(RecipeError, match="has no rows"):
        open_rows(task(str(path))).columns(["text"])


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="evaluate.trec: .*no such file"):
        check_task(task(str(tmp_path / "rows.parquet")))


def test_other_formats(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("text,label\n")
    with pytest.raises(RecipeError, match="ending in .parquet or .jsonl"):
        check_task(task(str(tmp_path / "rows.csv")))


@pytest.mark.parametrize("suffix", WRITERS)
def test_damaged_file(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"rows.{suffix}"
    path.write_bytes(b'{"text": "a", \n]]')
    with pytest.raises(RecipeError, match="cannot be read"):
        check_task(task(str(path)))


@pytest.mark.parametrize("suffix", WRITERS)
def test_empty_cell(tmp_path: Path, suffix: str) -> None:
    data = WRITERS[suffix](tmp_path / f"rows.{suffix}", {"text": ["a", None], "label": [0, 1]})
    with pytest.raises(RecipeError, match="column 'text', row 1 is empty"):
        open_rows(task(data)).columns(["text", "label"])


def test_images_need_no_text(tmp_path: Path) -> None:
    data = write_parquet(tmp_path / "rows.parquet", {"image": [{"bytes": b"x", "path": None}], "label": [1]})
    check_task(task(data))
    with pytest.raises(RecipeError, match="no column 'text' and no column 'picture'; it has image, label"):
        check_task(task(data, image="picture"))


PIXELS = np.arange(24, dtype=np.uint8).reshape(4, 6)


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize(
    "cell",
    [
        png(PIXELS),
        {"bytes": png(PIXELS), "path": None},
        PIXELS.tolist(),
        PIXELS.astype(float).tolist(),
        PIXELS[:, :, None].tolist(),
        PIXELS[None].tolist(),
        np.repeat(PIXELS[:, :, None], 3, 2).tolist(),
        np.repeat(PIXELS[None], 3, 0).tolist(),
    ],
)
def test_images(cell: Any) -> None:
    assert np.array_equal(np.asarray(decode_image(cell, 1, "here")), PIXELS)
    assert np.array_equal(np.asarray(decode_image(cell, 3, "here")), np.repeat(PIXELS[:, :, None], 3, 2))


@pytest.mark.parametrize(
    "cell", [b"no image", {"bytes": None}, {"path": "x"}, [], [[0.5, 0.25]], [[300]], [[1, 2], [3]], "abc", [1, 2]]
)
def test_no_images(cell: Any) -> None:
    with pytest.raises(RecipeError, match="^here: "):
        decode_image(cell, 1, "here")
