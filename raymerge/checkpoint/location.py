"""Where a checkpoint lies: a local folder, a repository of the Hugging Face hub, or a prefix of object storage.

`path/to/folder`, `org/name[@revision]`, `s3://bucket/prefix` or `gs://bucket/prefix`. A hub revision is resolved to a
commit once, when a plan is made, so that all workers read the same bytes; files come from, and stay in, the hub's own
cache.
"""

import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath

from raymerge.checkpoint.ranges import RangedFile
from raymerge.checkpoint.remote import NO_CREDENTIALS, Stamp, fetch, has_credentials, is_remote, list_files
from raymerge.errors import CheckpointError


@dataclass(frozen=True, slots=True)
class Location:
    """A place that holds the files of a checkpoint. `revision` is a commit id for the hub, else None."""

    path: str
    revision: str | None = None

    def __str__(self) -> str:
        return self.path if self.revision is None else f"{self.path}@{self.revision}"

    @property
    def is_hub(self) -> bool:
        return self.revision is not None

    @property
    def is_remote(self) -> bool:
        """On object storage: weights are read by byte ranges, and never copied whole."""
        return is_remote(self.path)

    def files(self) -> dict[str, int]:
        """Names of the files at the top of the checkpoint, with their sizes in bytes."""
        if self.is_remote:
            return {name: size for name, (size, _) in _remote_files(self.path).items()}
        if self.is_hub:
            return dict(_hub_files(self))
        return {entry.name: entry.stat().st_size for entry in sorted(Path(self.path).iterdir()) if entry.is_file()}

    def ranged(self, name: str) -> RangedFile:
        """A file on object storage, of which ranges are to be read. Raises CheckpointError if there is none."""
        if name not in _remote_files(self.path):
            # As it was listed for a plan before.
            _remote_files.cache_clear()
        files = _remote_files(self.path)
        if name not in files:
            raise CheckpointError(f"{self}/{name}: no such file; is the checkpoint complete?")
        return RangedFile(self.path, name, files[name])

    def local_path(self, name: str) -> Path:
        """A local file with the contents of `name`; from the hub or object storage if it is not in the cache.

        Raises CheckpointError if there is no such file or `name` leaves the checkpoint.
        """
        inside = PurePosixPath(name)
        if inside.is_absolute() or ".." in inside.parts or os.sep in name.replace("/", ""):
            raise CheckpointError(f"{self}: file name {name!r} leaves its folder; the index is damaged or hostile")
        if self.is_remote:
            if name not in _remote_files(self.path):
                raise CheckpointError(f"{self}/{name}: no such file; is the checkpoint complete?")
            return fetch(self.path, name, _remote_stamp(self.path))
        if self.is_hub:
            return _hub_download(self, name)
        path = Path(self.path) / name
        if not path.is_file():
            raise CheckpointError(f"{path}: no such file; is the checkpoint complete?")
        return path

    def as_pretrained(self) -> tuple[str, str]:
        """Name and revision as `from_pretrained` of transformers takes them, of all but the weights."""
        if self.is_remote:
            for name in self.files():
                if not name.endswith(".safetensors"):
                    self.local_path(name)
            return str(self.local_path("config.json").parent), "main"
        return self.path, self.revision or "main"

    def cached_path(self, name: str) -> Path | None:
        """Where a file of a hub's checkpoint lies in the cache; None if it has not been downloaded."""
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(self.path, name, revision=self.revision)
        return Path(found) if isinstance(found, str) else None


@lru_cache(maxsize=256)
def _remote_files(uri: str) -> dict[str, Stamp]:
    return list_files(uri)


def _remote_stamp(uri: str) -> Stamp:
    """Changes when any file at a place does."""
    files = _remote_files(uri).values()
    return sum(size for size, _ in files), max(changed for _, changed in files)


def resolve(text: str) -> Location:
    """Find a checkpoint: a local folder if there is one of that name, else `org/name[@revision]` on the hub.

    Raises CheckpointError if it is neither.
    """
    if is_remote(text):
        if has_credentials(text):
            raise CheckpointError(NO_CREDENTIALS)
        if not text.startswith(("s3://", "gs://")):
            raise CheckpointError(f"{text}: s3:// or gs:// is expected, a folder, or a hub id (org/name[@revision])")
        # Asked anew for each plan, then remembered by it.
        _remote_files.cache_clear()
        location = Location(text.rstrip("/"))
        if not location.files():
            raise CheckpointError(f"{text}: there are no files, or none that you may see")
        return location
    folder = Path(text).expanduser()
    if folder.is_dir():
        return Location(str(folder.resolve()))
    name, _, revision = text.partition("@")
    if folder.is_absolute() or text.startswith((".", "~")) or name.count("/") != 1:
        raise CheckpointError(f"{text}: no such folder, and not a hub id (org/name[@revision])")
    from huggingface_hub import HfApi
    from huggingface_hub.errors import OfflineModeIsEnabled, RepositoryNotFoundError

    try:
        found = HfApi().model_info(name, revision=revision or None)
    except RepositoryNotFoundError:
        raise CheckpointError(f"{text}: no such folder, and the hub has no such repository for you") from None
    except OfflineModeIsEnabled:
        return Location(name, _cached_commit(name, revision or "main", text))
    except Exception as problem:  # of the HTTP library that the hub's client happens to use
        raise CheckpointError(f"{text}: no such folder, and the hub did not answer: {problem}") from None
    # By its name, so that the cache knows which commit the name means when offline.
    _hub_download(Location(name, revision or "main"), "config.json")
    return Location(name, found.sha)


def _cached_commit(name: str, revision: str, text: str) -> str:
    """The commit of a revision in the hub's cache, for work offline (HF_HUB_OFFLINE=1)."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, "config.json", revision=revision)
    if not isinstance(found, str):
        raise CheckpointError(f"{text}: no such folder, and not in the hub's cache while offline")
    return Path(found).parent.name


@lru_cache(maxsize=256)
def _hub_files(location: Location) -> dict[str, int]:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import OfflineModeIsEnabled

    try:
        info = HfApi().model_info(location.path, revision=location.revision, files_metadata=True)
    except OfflineModeIsEnabled:
        return Location(str(_hub_download(location, "config.json").parent)).files()
    except Exception as problem:
        raise CheckpointError(f"{location}: the hub did not answer: {problem}") from None
    return {file.rfilename: file.size or 0 for file in info.siblings or [] if "/" not in file.rfilename}


def _hub_download(location: Location, name: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    try:
        return Path(hf_hub_download(location.path, name, revision=location.revision))
    except EntryNotFoundError:
        raise CheckpointError(f"{location}: no file {name}; is the checkpoint complete?") from None
    except Exception as problem:
        raise CheckpointError(f"{location}: {name} could not be downloaded: {problem}") from None
