"""Read the columns of a data file, checked: Parquet (`.parquet`) or one JSON object a line (`.jsonl`).

A folder stands for all its files in order of their names. Local paths, or what pyarrow.fs knows (`s3://`, `gs://`).
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.fs

from raymerge.checkpoint.remote import ATTEMPTS, is_remote, open_filesystem
from raymerge.errors import RayMergeError, RecipeError, StorageError, nearest

_SUFFIXES = (".parquet", ".jsonl", ".ndjson")

Fits = Callable[[pa.DataType], bool]


class Rows:
    """The rows of a data file or folder. `where` is the place in the recipe that names it, for errors.

    Raises RecipeError: no file, a file of another kind, a damaged file, no rows; StorageError where object storage
    fails.
    """

    def __init__(self, data: str, where: str) -> None:
        self.data = data
        self.where = where
        self._filesystem, self._files = self._find()
        self.schema, _ = self._open(self._files[0], None)

    @property
    def fingerprint(self) -> str:
        """Changes when a file, its size or its modification time does."""
        try:
            infos = self._filesystem.get_file_info(self._files)
        except OSError as problem:
            raise self._unreadable(problem) from None
        return ", ".join(f"{info.path} {info.size} {info.mtime_ns}" for info in infos)

    def file_hashes(self) -> frozenset[str]:
        """SHA-256 of each file's bytes: the same rows under another name are found."""
        found = set()
        try:
            for path in self._files:
                with self._filesystem.open_input_stream(path) as stream:
                    found.add(hashlib.file_digest(stream, "sha256").hexdigest())
        except OSError as problem:
            raise self._unreadable(problem) from None
        return frozenset(found)

    def require(self, wanted: Mapping[str, Fits]) -> None:
        """Refuse columns that are not there, or hold something else. Raises RecipeError."""
        for name, fits in wanted.items():
            if name not in self.schema.names:
                raise self.error(f"has no column {name!r}; {nearest(name, self.schema.names)}")
            kind = self.schema.field(name).type
            if not fits(kind):
                raise self.error(f"column {name!r} holds {kind}; {_EXPECTED[fits]} is expected")

    def require_some(self) -> None:
        """Raises RecipeError if there are no rows."""
        if not any(batch.num_rows for batch in self._batches(None)):
            raise self.error("has no rows; at least one is expected")

    def columns(self, names: Sequence[str], limit: int | None = None) -> dict[str, list[Any]]:
        """The values of some columns, row by row, of the first `limit` rows; none is null. Raises RecipeError."""
        self.require({name: lambda _: True for name in names})
        found: dict[str, list[Any]] = {name: [] for name in names}
        left = limit
        for batch in self._batches(names):
            part = batch if left is None else batch.slice(0, left)
            for name in names:
                found[name].extend(part.column(name).to_pylist())
            if left is not None:
                left -= part.num_rows
                if left == 0:
                    break
        for name, values in found.items():
            if not values:
                raise self.error("has no rows; at least one is expected")
            if None in values:
                raise self.error(f"column {name!r}, row {values.index(None)} is empty")
        return found

    def error(self, what: str) -> RecipeError:
        """An error about this data."""
        return RecipeError(f"{self.where}: {self.data} {what}")

    def _unreadable(self, problem: Exception) -> RayMergeError:
        if is_remote(self.data) and isinstance(problem, OSError):
            return StorageError(f"{self.where}: {self.data} cannot be read: {problem}")
        return self.error(f"cannot be read: {problem}")

    def _find(self) -> tuple[pa.fs.FileSystem, list[str]]:
        """The file system, and the paths of the files there."""
        try:
            if is_remote(self.data):
                filesystem, path = open_filesystem(self.data, attempts=ATTEMPTS)
            else:
                filesystem, path = pa.fs.LocalFileSystem(), str(Path(self.data).expanduser().absolute())
            info = filesystem.get_file_info(path)
            if info.type == pa.fs.FileType.Directory:
                inside = filesystem.get_file_info(pa.fs.FileSelector(path))
                files = sorted(entry.path for entry in inside if entry.path.endswith(_SUFFIXES))
                if not files:
                    raise self.error(f"is a folder without files ending in {' or '.join(_SUFFIXES)}")
                return filesystem, files
        except (pa.ArrowException, OSError) as problem:
            raise self._unreadable(problem) from None
        if not path.endswith(_SUFFIXES):
            raise self.error(f"was found; a file ending in {' or '.join(_SUFFIXES)}, or a folder, is expected")
        if info.type != pa.fs.FileType.File:
            raise self.error(f"is not there (no such file, seen from {Path.cwd()})")
        return filesystem, [path]

    def _batches(self, names: Sequence[str] | None) -> Iterator[pa.RecordBatch]:
        for file in self._files:
            schema, batches = self._open(file, names)
            missing = set(names or ()) - set(schema.names)
            if missing:
                raise self.error(f"has no column {', '.join(map(repr, sorted(missing)))} in {file}")
            try:
                yield from batches
            except (pa.ArrowException, OSError) as problem:
                raise self._unreadable(problem) from None

    def _open(self, file: str, names: Sequence[str] | None) -> tuple[pa.Schema, Iterator[pa.RecordBatch]]:
        """The columns of a file and its rows in batches."""
        try:
            handle = self._filesystem.open_input_file(file)
            if file.endswith(".parquet"):
                import pyarrow.parquet

                opened = pyarrow.parquet.ParquetFile(handle)
                known = [name for name in names or () if name in opened.schema_arrow.names]
                rows = opened.iter_batches(batch_size=1024, columns=known if names is not None else None)
                return opened.schema_arrow, rows
            if not handle.size():
                raise self.error("has no rows; at least one is expected")
            import pyarrow.json

            # Rows longer than a block cannot be read, and images as lists of pixels are long.
            reader = pyarrow.json.open_json(handle, read_options=pyarrow.json.ReadOptions(block_size=16 * 2**20))
            return reader.schema, iter(reader)
        except (pa.ArrowException, OSError) as problem:
            raise self._unreadable(problem) from None


def is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def is_label(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_boolean(kind)) or is_text(kind)


def is_image(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return any(kind.field(i).name == "bytes" for i in range(kind.num_fields))
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_nested(kind))


def is_list_of_integers(kind: pa.DataType) -> bool:
    return _is_list(kind) and bool(pa.types.is_integer(kind.value_type))


def is_list_of_messages(kind: pa.DataType) -> bool:
    if not _is_list(kind) or not pa.types.is_struct(kind.value_type):
        return False
    inside = kind.value_type
    return {"role", "content"} <= {inside.field(i).name for i in range(inside.num_fields)}


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind))


_EXPECTED: dict[Fits, str] = {
    is_text: "text",
    is_label: "a class number or class name",
    is_image: "a struct with bytes, bytes, or lists of pixels",
    is_list_of_integers: "lists of token ids",
    is_list_of_messages: "lists of messages with role and content",
}
