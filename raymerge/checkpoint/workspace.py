"""Where an output grows: `OUT.partial`, renamed to `OUT` in one step when everything in it is whole.

So `OUT` never holds anything unfinished, and a run killed at any moment leaves its finished files in
`OUT.partial`, where the same command finds them again.
"""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from raymerge.checkpoint.place import OutputPath, RemotePath
from raymerge.checkpoint.writer import TEMPORARY, sync_folder, write_text
from raymerge.errors import OutputError, StorageError

_OURS = "raymerge"
DIGEST = f"{_OURS}/plan.sha256"


@dataclass(frozen=True, slots=True)
class Workspace:
    """An output in the making: the weights grow in `folder`, all that is small in `staging`.

    On a disk both are the partial folder, while `finished` is False.
    """

    out: OutputPath
    folder: OutputPath
    staging: Path
    finished: bool

    def publish(self) -> None:
        """Rename the partial folder to the output's name. Raises StorageError."""
        assert isinstance(self.out, Path)
        try:
            for left in self.staging.rglob(f"*{TEMPORARY}"):
                left.unlink(missing_ok=True)
            sync_folder(self.staging)
            os.rename(self.staging, self.out)
            # Not before: whoever takes the lock must find either the lock held or the output in place.
            (self.out / _LOCK).unlink()
            sync_folder(self.out.parent)
        except OSError as problem:
            raise StorageError(f"{self.out}: cannot be put in place: {problem.strerror}") from None


_LOCK = ".lock"


def is_whole(path: OutputPath, num_bytes: int) -> bool:
    """A file of an output was written, by this or an earlier run, and to its end. Raises StorageError."""
    if isinstance(path, RemotePath):
        return path.num_bytes == num_bytes
    return path.is_file() and path.stat().st_size == num_bytes


@contextmanager
def open_workspace(out: Path, digest: str, overwrite: bool) -> Iterator[Workspace]:
    """The workspace of an output on a disk whose plan has this digest.

    Raises OutputError if the output exists with other contents, holds unfinished work of another plan,
    or is being written by another process. `overwrite` removes what is in the way, when the new output
    is about to begin.
    """
    out = out.absolute()
    partial = out.with_name(f"{out.name}.partial")
    if _is_finished(out, digest, overwrite):
        yield Workspace(out, out, out, True)
        return
    try:
        partial.mkdir(parents=True, exist_ok=True)
        handle = os.open(partial / _LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as problem:
        raise OutputError(f"{partial}: cannot be written: {problem.strerror}") from None
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise OutputError(f"{partial}: another process is writing it; wait for it, or stop it") from None
        # Another process may have put its output in place since it was looked for.
        if _is_finished(out, digest, overwrite):
            shutil.rmtree(partial, ignore_errors=True)
            yield Workspace(out, out, out, True)
            return
        try:
            _resume_or_begin(partial, digest, overwrite)
            if _is_taken(out):
                shutil.rmtree(out)
        except OSError as problem:
            raise OutputError(f"{problem.filename or out}: cannot be removed: {problem.strerror}") from None
        yield Workspace(out, partial, partial, False)
    finally:
        os.close(handle)


def _is_finished(out: Path, digest: str, overwrite: bool) -> bool:
    """True if the output is there already. Raises OutputError if something else is, and may not be removed."""
    if not _is_taken(out):
        return False
    if overwrite:
        _require_ours(out)
        return False
    if _digest_of(out) != digest:
        raise OutputError(f"{out}: exists and is not the result of this recipe; choose another folder or overwrite")
    return True


def _resume_or_begin(partial: Path, digest: str, overwrite: bool) -> None:
    found = _digest_of(partial)
    if found == digest:
        return
    if found is not None and not overwrite:
        raise OutputError(
            f"{partial}: holds unfinished work of another recipe or of inputs that have changed; remove it or overwrite"
        )
    entries = [entry for entry in partial.iterdir() if entry.name not in (_LOCK, _OURS)]
    if found is None and entries:
        raise OutputError(f"{partial}: holds {entries[0].name}, which RayMerge did not write; move it away")
    # What says that the rest is ours goes last.
    for entry in [*entries, partial / _OURS]:
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink(missing_ok=True)
    write_text(partial / DIGEST, digest)


def _is_taken(out: Path) -> bool:
    return out.exists() and not (out.is_dir() and not any(out.iterdir()))


def _digest_of(folder: Path) -> str | None:
    path = folder / DIGEST
    return path.read_text(encoding="utf-8") if path.is_file() else None


def _require_ours(out: Path) -> None:
    """Overwriting removes outputs of RayMerge only."""
    if _digest_of(out) is None:
        raise OutputError(f"{out}: exists and was not made by RayMerge; it is not overwritten, choose another folder")
