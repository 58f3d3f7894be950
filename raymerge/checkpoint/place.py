"""Where an output grows: a local path, or one on object storage that answers to the same few words.

A file on object storage appears under its name when its upload ends, whole; there is nothing to rename.
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from safetensors.torch import load, load_file
from torch import Tensor

from raymerge.checkpoint.header import header_length, parse_header
from raymerge.checkpoint.remote import NO_CREDENTIALS, has_credentials, is_remote, open_filesystem, persist
from raymerge.errors import RecipeError, StorageError


@dataclass(frozen=True, slots=True)
class RemotePath:
    """A file or a prefix, `s3://bucket/...` or `gs://bucket/...`, without a slash at its end."""

    uri: str

    def __truediv__(self, name: str) -> "RemotePath":
        return RemotePath(f"{self.uri}/{name}")

    def __str__(self) -> str:
        return self.uri

    @property
    def name(self) -> str:
        return PurePosixPath(self.uri).name

    @property
    def num_bytes(self) -> int | None:
        """The size of the file; None if there is none. Raises StorageError."""
        from pyarrow.fs import FileType

        with self.open() as (filesystem, path):
            info = persist(lambda: filesystem.get_file_info(path))
        return info.size if info.type == FileType.File else None

    def is_file(self) -> bool:
        return self.num_bytes is not None

    def files(self) -> list[str]:
        """Names of all files below, relative to this prefix, in order. Raises StorageError."""
        from pyarrow.fs import FileSelector, FileType

        with self.open() as (filesystem, path):
            found = persist(lambda: filesystem.get_file_info(FileSelector(path, allow_not_found=True, recursive=True)))
        return sorted(info.path.removeprefix(f"{path}/") for info in found if info.type == FileType.File)

    def read_bytes(self) -> bytes:
        """The whole file. Raises StorageError."""

        def read() -> bytes:
            with filesystem.open_input_stream(path) as stream:
                content: bytes = stream.read()
            return content

        with self.open() as (filesystem, path):
            return persist(read)

    def read_text(self, encoding: str = "utf-8") -> str:
        return self.read_bytes().decode(encoding)

    def write_bytes(self, content: bytes) -> None:
        """Write a small file, in one request. Raises StorageError."""

        def write() -> None:
            with filesystem.open_output_stream(path) as stream:
                stream.write(content)

        with self.open() as (filesystem, path):
            persist(write)

    def unlink(self) -> None:
        """Remove the file. Raises StorageError."""
        with self.open() as (filesystem, path):
            persist(lambda: filesystem.delete_file(path))

    def copy_small(self, folder: Path) -> None:
        """Copy all below that is no weights to a folder on this machine. Raises StorageError."""
        for name in self.files():
            if not name.endswith(".safetensors"):
                copy = folder / name
                copy.parent.mkdir(parents=True, exist_ok=True)
                copy.write_bytes((self / name).read_bytes())

    @contextmanager
    def open(self, **options: int) -> Iterator[tuple[Any, str]]:
        """The file system and the path in it; what fails within is a StorageError that names this place.

        `options` are those of `open_filesystem`.
        """
        try:
            yield open_filesystem(self.uri, **options)
        except (OSError, ValueError) as problem:
            raise StorageError(f"{self}: {problem}; check the place, the credentials and the network") from None


OutputPath = Path | RemotePath


def output_path(text: str | Path) -> OutputPath:
    """The place an output is to be written to. Raises RecipeError if it is neither a folder nor `s3://`, `gs://`."""
    if not is_remote(str(text)):
        return Path(text)
    if not str(text).startswith(("s3://", "gs://")):
        raise RecipeError(f"{text}: a folder, s3:// or gs:// is expected")
    if has_credentials(str(text)):
        raise RecipeError(NO_CREDENTIALS)
    return RemotePath(str(text).rstrip("/"))


def load_tensors(path: OutputPath) -> dict[str, Tensor]:
    """All tensors of a safetensors file, in order of their bytes. Raises StorageError."""
    if not isinstance(path, RemotePath):
        found: dict[str, Tensor] = load_file(path)
        return found
    content = path.read_bytes()
    length = header_length(content[:8], len(content), str(path))
    entries = parse_header(content[8 : 8 + length], len(content), str(path))
    tensors = load(content)
    return {entry.name: tensors[entry.name] for entry in sorted(entries, key=lambda entry: entry.start)}


def remove_tree(path: OutputPath) -> None:
    """Remove a folder of ours with all that is in it. Raises StorageError."""
    if not isinstance(path, RemotePath):
        shutil.rmtree(path, ignore_errors=True)
    elif path.files():
        with path.open() as (filesystem, name):
            persist(lambda: filesystem.delete_dir(name))
