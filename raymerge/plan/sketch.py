"""A checkpoint that is only a `config.json`: what its weights would be, so that big merges are planned without them."""

import hashlib
import json

import torch

from raymerge.checkpoint.header import NAMES, Entry, Headers
from raymerge.checkpoint.index import SINGLE, Checkpoint, has_weights, open_checkpoint, read_json
from raymerge.checkpoint.location import resolve
from raymerge.models.families import parameter_shapes


def open_or_sketch(text: str, headers: Headers) -> Checkpoint:
    """The checkpoint at a folder or hub id; if it has no weights, one with the tensors its config describes.

    Names and layouts are those of the model in memory, which for mixtures are not those of files. Raises
    CheckpointError as `open_checkpoint` does, or if transformers does not know the model.
    """
    location = resolve(text)
    files = location.files()
    if has_weights(files):
        return open_checkpoint(text, headers)
    config = read_json(location, "config.json", files)
    dtype = NAMES[getattr(torch, str(config.get("dtype") or config.get("torch_dtype") or "float32"))]
    tensors: dict[str, tuple[str, Entry]] = {}
    start = 0
    for name, shape in parameter_shapes(config).items():
        entry = Entry(name, dtype, shape, start)
        tensors[name] = (SINGLE, entry)
        start += entry.num_bytes
    digest = hashlib.sha256(f"{location}\0{json.dumps(config, sort_keys=True)}".encode()).hexdigest()
    return Checkpoint(location, config, tensors, digest, is_sketch=True)
