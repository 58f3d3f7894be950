"""The journal of a search: what was asked and what was told, a small file an event, so that a kill loses no trial."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from raymerge.checkpoint.place import OutputPath, RemotePath, remove_tree
from raymerge.checkpoint.writer import write_text

FOLDER = "journal"


@dataclass(frozen=True, kw_only=True, slots=True)
class Trial:
    """One trial: its numbers by axis, what it reached, or the error that ended it.

    `share` is of the rows it has seen: below 1 where it was stopped early. `finished_at` is in seconds since 1970.
    """

    number: int
    values: Mapping[str, Any]
    scores: Mapping[str, float]
    share: float
    merge_seconds: float
    evaluate_seconds: float
    finished_at: float
    error: str | None = None

    @property
    def is_whole(self) -> bool:
        """It has seen all rows."""
        return self.error is None and self.share == 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """The numbers, by axis, that a trial was begun with."""

    number: int
    values: Mapping[str, Any]


class Journal:
    """Events below the folder of an output, in the order they came."""

    def __init__(self, out: OutputPath) -> None:
        self._folder = out / FOLDER
        self._length = 0

    def read(self) -> Iterator[Asked | Trial]:
        """All that was written by a run before. Raises StorageError."""
        for name in self._names():
            event = json.loads((self._folder / name).read_text(encoding="utf-8"))
            self._length += 1
            yield Trial(**event) if "scores" in event else Asked(**event)

    def append(self, event: Asked | Trial) -> None:
        """Write one more event. Raises StorageError."""
        write_text(self._folder / f"{self._length:06}.json", json.dumps(asdict(event)) + "\n")
        self._length += 1

    def _names(self) -> list[str]:
        if isinstance(self._folder, RemotePath):
            return self._folder.files()
        # A file that was being written at a kill has another suffix.
        return sorted(path.name for path in self._folder.glob("*.json"))


def discard_journal(out: OutputPath) -> None:
    """Remove what only served to go on after a kill. Raises StorageError."""
    remove_tree(out / FOLDER)
