"""An output on object storage, where nothing can be renamed: shards go to their place as they end, what makes a
model of them is kept here and goes last.

So a model that is not finished has no config.json, and its digest tells the same command what it may go on from.
"""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from raymerge.checkpoint.index import INDEX
from raymerge.checkpoint.place import RemotePath
from raymerge.checkpoint.workspace import DIGEST, Workspace
from raymerge.errors import OutputError

# The facts of a run come last of all: where they are, the output is whole.
FACTS = ("raymerge/run.json", "raymerge/search.json")
LAST = (INDEX, "config.json", *FACTS)


class RemoteWorkspace(Workspace):
    """An output in the making on object storage."""

    def publish(self) -> None:
        """Upload what was kept here, the facts of the run last. Raises StorageError."""
        assert isinstance(self.out, RemotePath)
        names = sorted(path.relative_to(self.staging).as_posix() for path in self.staging.rglob("*") if path.is_file())
        for name in sorted(names, key=lambda name: LAST.index(name) if name in LAST else -1):
            (self.out / name).write_bytes((self.staging / name).read_bytes())


@contextmanager
def open_remote_workspace(out: RemotePath, digest: str, overwrite: bool) -> Iterator[Workspace]:
    """As `open_workspace`, but nobody is kept from writing to the same place."""
    files = out.files()
    found = (out / DIGEST).read_text() if DIGEST in files else None
    complete = any(name in files for name in FACTS)
    if files and found is None:
        raise OutputError(f"{out}: holds {files[0]}, which RayMerge did not write; choose another place")
    with tempfile.TemporaryDirectory(prefix="raymerge-") as staging:
        if complete and found == digest and not overwrite:
            yield RemoteWorkspace(out, out, Path(staging), True)
            return
        if files and not overwrite and found != digest:
            what = "is not the result of this recipe" if complete else "holds unfinished work of another recipe"
            raise OutputError(f"{out}: {what}, or its inputs have changed; choose another place or overwrite")
        if files and (complete or found != digest):
            # What says that the rest is ours goes last.
            for name in sorted(files, key=lambda name: (name == DIGEST, name not in LAST)):
                (out / name).unlink()
        (out / DIGEST).write_bytes(digest.encode())
        yield RemoteWorkspace(out, out, Path(staging), False)
