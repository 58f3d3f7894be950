"""Read the columns of a task's data file, checked: Parquet (`.parquet`) or one JSON object a line (`.jsonl`)."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from raymerge.errors import RecipeError
from raymerge.recipe.schema import Task
from raymerge.recipe.settings import nearest

_SUFFIXES = (".parquet", ".jsonl", ".ndjson")


def check_task(task: Task) -> None:
    """Check that a task's file exists, has rows, and has the columns the task names; no model is loaded.

    Raises RecipeError.
    """
    schema, batches = _open(task)
    if task.kind == "perplexity":
        _require(task, schema, {task.text: _is_text})
    else:
        texts = [name for name in (task.text, task.text_pair) if name is not None]
        wanted: dict[str, Callable[[pa.DataType], bool]] = {task.label: _is_label}
        # Whether texts or images are read depends on the model, which is not loaded here.
        if task.text in schema.names:
            wanted.update(dict.fromkeys(texts, _is_text))
        elif task.image in schema.names:
            wanted[task.image] = _is_image
        else:
            raise RecipeError(
                f"{_where(task)}: {task.data} has no column {task.text!r} and no column {task.image!r}; it has "
                f"{', '.join(schema.names)}; set text or image to one of them"
            )
        _require(task, schema, wanted)
    if not any(batch.num_rows for batch in batches):
        raise RecipeError(f"{_where(task)}: {task.data} has no rows; at least one is expected")


def read_columns(task: Task, columns: Sequence[str]) -> dict[str, list[Any]]:
    """The values of some columns, row by row, for the first `task.limit` rows; none is null.

    Raises RecipeError: no file, no rows, no such column, an empty cell.
    """
    schema, batches = _open(task, columns)
    _require(task, schema, {name: lambda _: True for name in columns})
    found: dict[str, list[Any]] = {name: [] for name in columns}
    left = task.limit
    for batch in batches:
        part = batch if left is None else batch.slice(0, left)
        for name in columns:
            found[name].extend(part.column(name).to_pylist())
        if left is not None:
            left -= part.num_rows
            if left == 0:
                break
    for name, values in found.items():
        if not values:
            raise RecipeError(f"{_where(task)}: {task.data} has no rows; at least one is expected")
        if None in values:
            raise RecipeError(f"{_where(task)}: {task.data}: column {name!r}, row {values.index(None)} is empty")
    return found


def _open(task: Task, columns: Sequence[str] | None = None) -> tuple[pa.Schema, Iterator[pa.RecordBatch]]:
    """The columns of a file and its rows in batches."""
    path = Path(task.data).expanduser()
    if path.suffix not in _SUFFIXES:
        raise RecipeError(f"{_where(task)}: found {task.data}; a file ending in {' or '.join(_SUFFIXES)} is expected")
    if not path.is_file():
        raise RecipeError(f"{_where(task)}: {task.data}: no such file, seen from {Path.cwd()}")
    try:
        if path.suffix == ".parquet":
            import pyarrow.parquet

            file = pyarrow.parquet.ParquetFile(path)
            known = [name for name in columns or () if name in file.schema_arrow.names]
            rows = file.iter_batches(batch_size=1024, columns=known if columns is not None else None)
            return file.schema_arrow, _checked(task, rows)
        if not path.read_bytes()[:1]:
            raise RecipeError(f"{_where(task)}: {task.data} has no rows; at least one is expected")
        import pyarrow.json

        # Rows longer than a block cannot be read, and images as lists of pixels are long.
        reader = pyarrow.json.open_json(path, read_options=pyarrow.json.ReadOptions(block_size=16 * 2**20))
        return reader.schema, _checked(task, iter(reader))
    except (pa.ArrowException, OSError) as problem:
        raise RecipeError(f"{_where(task)}: {task.data} cannot be read: {problem}") from None


def _checked(task: Task, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    try:
        yield from batches
    except (pa.ArrowException, OSError) as problem:
        raise RecipeError(f"{_where(task)}: {task.data} cannot be read: {problem}") from None


def _require(task: Task, schema: pa.Schema, wanted: dict[str, Callable[[pa.DataType], bool]]) -> None:
    for name, fits in wanted.items():
        if name not in schema.names:
            raise RecipeError(f"{_where(task)}: {task.data} has no column {name!r}; {nearest(name, schema.names)}")
        kind = schema.field(name).type
        if not fits(kind):
            raise RecipeError(
                f"{_where(task)}: {task.data}: column {name!r} holds {kind}; {_EXPECTED[fits]} is expected"
            )


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _is_label(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_boolean(kind)) or _is_text(kind)


def _is_image(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return any(kind.field(i).name == "bytes" for i in range(kind.num_fields))
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_nested(kind))


_EXPECTED: dict[Callable[[pa.DataType], bool], str] = {
    _is_text: "text",
    _is_label: "a class number or class name",
    _is_image: "a struct with bytes, bytes, or lists of pixels",
}


def _where(task: Task) -> str:
    return f"evaluate.{task.task}"
