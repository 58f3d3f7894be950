"""What a checkpoint holds: every tensor's file, dtype, shape and place, from headers alone."""

import hashlib
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from raymerge.checkpoint.header import Entry, Headers, header_length
from raymerge.checkpoint.location import Location, resolve
from raymerge.errors import CheckpointError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint whose headers have been read.

    `tensors` maps a tensor's name to its file and entry, in the order of files and bytes;
    `fingerprint` changes when a header, a size or a modification time does. A sketch has no weights: its tensors
    are what its config describes.
    """

    location: Location
    config: Mapping[str, Any]
    tensors: Mapping[str, tuple[str, Entry]]
    fingerprint: str
    is_sketch: bool = False

    @property
    def num_bytes(self) -> int:
        return sum(entry.num_bytes for _, entry in self.tensors.values())


def open_checkpoint(text: str, headers: Headers | None = None) -> Checkpoint:
    """Read the headers of the checkpoint at a folder or hub id; those that are in `headers` are not parsed again.

    Raises CheckpointError if it is missing, incomplete, damaged, or has no safetensors.
    """
    headers = headers or Headers()
    location = resolve(text)
    files = location.files()
    weight_map = _read_index(location, files)
    shards = sorted(set(weight_map.values())) if weight_map else [_only_file(location, files)]
    tensors: dict[str, tuple[str, Entry]] = {}
    digest = hashlib.sha256(str(location).encode())
    with ThreadPoolExecutor(16) as pool:
        heads = pool.map(lambda name: _read_header(location, name, files[name]), shards)
        for name, (head, stamp) in zip(shards, heads, strict=True):
            size = files[name]
            digest.update(name.encode() + head + stamp + str(size).encode())
            for entry in headers.parse(head, size, f"{location}/{name}"):
                if entry.name in tensors:
                    raise CheckpointError(f"{location}: {entry.name} stands in {tensors[entry.name][0]} and in {name}")
                tensors[entry.name] = (name, entry)
                if weight_map.get(entry.name) == name:
                    del weight_map[entry.name]
    if weight_map:
        key, name = next(iter(weight_map.items()))
        raise CheckpointError(f"{location}: the index says {key} is in {name}, where it is not")
    return Checkpoint(location, read_json(location, "config.json", files), tensors, digest.hexdigest())


def read_json(location: Location, name: str, files: Mapping[str, int]) -> dict[str, Any]:
    """A JSON object of the checkpoint. Raises CheckpointError if it is missing or damaged."""
    if name not in files:
        raise CheckpointError(f"{location}: no {name}; a Hugging Face checkpoint folder is expected")
    try:
        found = json.loads(location.local_path(name).read_bytes())
    except (ValueError, OSError) as problem:
        raise CheckpointError(f"{location}: {name} cannot be read: {problem}") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{location}: {name} holds a {type(found).__name__}, an object is expected")
    return found


def has_weights(files: Mapping[str, int]) -> bool:
    """A checkpoint with these files has weights, of a kind that is read or not."""
    return any(name.endswith((".safetensors", ".bin", ".pt", ".pth")) or name == INDEX for name in files)


def _read_index(location: Location, files: Mapping[str, int]) -> dict[str, str]:
    """The file of each tensor; empty for a checkpoint without an index."""
    if INDEX not in files:
        return {}
    weight_map = read_json(location, INDEX, files).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise CheckpointError(f"{location}: {INDEX} has no weight_map of names to files; it is damaged")
    for name in sorted(set(weight_map.values())):
        if name not in files:
            location.local_path(name)  # says if the name leaves the folder
            raise CheckpointError(f"{location}: {name} is in the index but not in the folder")
    return weight_map


def _only_file(location: Location, files: Mapping[str, int]) -> str:
    if SINGLE in files:
        return SINGLE
    pickled = [name for name in files if name.endswith((".bin", ".pt", ".pth"))]
    found = f"found {', '.join(pickled)}, which are pickles and are not read; " if pickled else ""
    raise CheckpointError(f"{location}: no {SINGLE} and no {INDEX}; {found}save it as safetensors")


def _read_header(location: Location, name: str, size: int) -> tuple[bytes, bytes]:
    """The header of a shard, and what changes when the shard does, beside its size."""
    where = f"{location}/{name}"
    if location.is_remote:
        return _read_remote_header(location, name, size)
    path = location.cached_path(name) if location.is_hub else location.local_path(name)
    if path is None:
        return _read_hub_header(location, name, size), b""
    try:
        with path.open("rb") as file:
            first = file.read(8)
            head = file.read(header_length(first, size, where))
            # A file of a commit on the hub never changes.
            return head, b"" if location.is_hub else str(path.stat().st_mtime_ns).encode()
    except OSError as problem:
        raise CheckpointError(f"{where}: cannot be read: {problem.strerror}") from None


def _read_remote_header(location: Location, name: str, size: int) -> tuple[bytes, bytes]:
    """Read a header on object storage by byte range; and the file's modification time."""
    where = f"{location}/{name}"
    file = location.ranged(name)
    try:
        return file.read(8, header_length(file.read(0, 8), size, where)), str(file.stamp[1]).encode()
    except OSError as problem:
        raise CheckpointError(f"{where}: cannot be read: {problem}") from None
    finally:
        file.close()


def _read_hub_header(location: Location, name: str, size: int) -> bytes:
    """Read a header on the hub by byte range, without downloading the file."""
    from huggingface_hub import HfFileSystem

    where = f"{location}/{name}"
    try:
        with HfFileSystem().open(f"{location.path}@{location.revision}/{name}", "rb", block_size=1 << 16) as file:
            first = bytes(file.read(8))
            return bytes(file.read(header_length(first, size, where)))
    except CheckpointError:
        raise
    except Exception as problem:  # of the HTTP library that the hub's client happens to use
        raise CheckpointError(f"{where}: its header could not be read from the hub: {problem}") from None
