"""What stands beside the weights in a Hugging Face checkpoint: config, index, tokenizer files, card."""

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from raymerge.checkpoint.index import INDEX, SINGLE
from raymerge.checkpoint.location import Location
from raymerge.checkpoint.writer import write_text
from raymerge.errors import StorageError

# What experts keep for themselves, a folder each.
HEADS = "raymerge/heads"
# What was merged, as it was asked for.
RECIPE = "raymerge/recipe.yml"

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "sentencepiece.bpe.model",
    "spiece.model",
    "tekken.json",
    "chat_template.jinja",
    "chat_template.json",
)
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
GENERATION_FILES = ("generation_config.json",)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def write_index(folder: Path, shards: Mapping[str, Iterable[str]], total_bytes: int) -> None:
    """The index of a sharded checkpoint: which tensor lies in which file. None for a single file."""
    if list(shards) == [SINGLE]:
        return
    weight_map = {name: file for file, names in shards.items() for name in names}
    write_json(
        folder / INDEX, {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
    )


def copy_first(names: Iterable[str], locations: Iterable[Location], folder: Path) -> Location | None:
    """Copy those of the files `names` that the first location to have any of them has; returns it."""
    wanted = tuple(names)
    for location in locations:
        found = [name for name in wanted if name in location.files()]
        for name in found:
            try:
                shutil.copyfile(location.local_path(name), folder / name)
            except OSError as problem:
                raise StorageError(f"{folder / name}: cannot be written: {problem.strerror}") from None
        if found:
            return location
    return None


def write_card(folder: Path, facts: Mapping[str, Any]) -> None:
    """The model card, README.md, from `card.jinja`."""
    templates = Environment(
        loader=PackageLoader("raymerge", "checkpoint"), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    write_text(folder / "README.md", templates.get_template("card.jinja").render(facts))
