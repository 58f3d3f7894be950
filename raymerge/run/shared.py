"""What every node of a cluster must see, and what one holds already; nodes need not share a disk otherwise."""

import socket
from dataclasses import dataclass
from pathlib import Path

from raymerge.checkpoint.location import Location
from raymerge.checkpoint.place import OutputPath
from raymerge.checkpoint.workspace import DIGEST
from raymerge.errors import StorageError

InputFile = tuple[str, str]
"""A checkpoint on the hub, and one of its files."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Shared:
    """What every node must see: the folder of the output (None: there is none yet), and the checkpoints."""

    folder: OutputPath | None
    locations: tuple[Location, ...]

    def require_here(self) -> None:
        """Raise StorageError if this node does not see it, which says what to do."""
        # What marks the output as ours is there from the start: a folder of the same name is not enough.
        unseen = self.folder if isinstance(self.folder, Path) and not (self.folder / DIGEST).is_file() else None
        for location in self.locations:
            if not (location.is_hub or location.is_remote or Path(location.path).is_dir()):
                unseen = Path(location.path)
        if unseen is not None:
            raise StorageError(
                f"{unseen}: the node {socket.gethostname()} does not see it; use a folder that is mounted at "
                f"this path on every node, or s3://, gs://"
            )

    def held_here(self) -> frozenset[InputFile]:
        """The files of the hub's checkpoints that this node has in its cache."""
        return frozenset(
            (str(location), name)
            for location in self.locations
            if location.is_hub
            for name in location.files()
            if name.endswith(".safetensors") and location.cached_path(name) is not None
        )
