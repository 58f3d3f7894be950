"""Which tensors the output has, where in each model they come from, and at what depth they stand.

Without slices the output has the frame's tensors (the base's, or the first expert's). With slices its
blocks are runs of the models' blocks, as in mergekit.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from raymerge.checkpoint.index import Checkpoint
from raymerge.errors import MismatchError, RecipeError
from raymerge.models import families
from raymerge.models.blocks import block_lists, block_name
from raymerge.recipe.schema import Recipe, Settings, Slice


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """One tensor of the output: its name, its depth in [0, 1], and the frame's names it has in each model.

    `names` holds the models that take part, in the order they are merged; `scopes` the slice's settings
    and each source's own.
    """

    name: str
    depth: float
    names: Mapping[str, str]
    scopes: tuple[Settings, ...] = ()
    own_scopes: Mapping[str, tuple[Settings, ...]]


def lay_out(recipe: Recipe, frame: Checkpoint) -> list[Place]:
    """The places of the output, in the frame's order. Raises RecipeError for slices that cannot be."""
    if recipe.slices is not None:
        return _sliced(recipe, frame)
    members = ("base", *recipe.experts)
    counts = block_lists(frame.tensors)
    own = {name: (expert.settings,) for name, expert in recipe.experts.items()}
    places = []
    for name in frame.tensors:
        block = block_name(name)
        depth = _depth(block.index, counts[block.prefix]) if block and block.prefix in counts else 0.0
        places.append(Place(name=name, depth=depth, names=dict.fromkeys(members, name), own_scopes=own))
    return places


def _depth(position: int, count: int) -> float:
    return position / (count - 1) if count > 1 else 1.0


def main_blocks(frame: Checkpoint) -> str:
    """The prefix of the one list of blocks that slices cut. Raises MismatchError if there are several."""
    counts = block_lists(frame.tensors)
    expected = frame.config.get(families.num_blocks_key(frame.config))
    found = [prefix for prefix, count in counts.items() if count == expected]
    if len(found) != 1:
        listed = ", ".join(f"{prefix} ({count})" for prefix, count in counts.items())
        raise MismatchError(f"{frame.location}: slices need one list of {expected} blocks; found {listed or 'none'}")
    return found[0]


def _sliced(recipe: Recipe, frame: Checkpoint) -> list[Place]:
    slices = recipe.slices or []
    prefix = main_blocks(frame)
    rests = [b.rest for name in frame.tensors if (b := block_name(name)) and (b.prefix, b.index) == (prefix, 0)]
    inside: list[Place] = []
    position = 0
    for number, part in enumerate(slices):
        length = _length(part, number)
        for offset in range(length):
            for rest in rests:
                names = {
                    model: f"{prefix}.{source.blocks[0] + offset}.{rest}" for model, source in part.sources.items()
                }
                inside.append(_place(f"{prefix}.{position}.{rest}", _depth(offset, length), names, part, recipe))
            position += 1
    outside = [name for name in frame.tensors if not ((b := block_name(name)) and b.prefix == prefix)]
    first, last = slices[0], slices[-1]
    before = frozenset(outside) if len(slices) == 1 else _before_blocks(frame, prefix)
    around = []
    for name in outside:
        part = first if name in before else last
        around.append(_place(name, 0.0, dict.fromkeys(part.sources, name), part, recipe))
    return around + inside


def _length(part: Slice, number: int) -> int:
    lengths = {source.blocks[1] - source.blocks[0] for source in part.sources.values()}
    if len(lengths) != 1 or min(lengths) < 1 or min(s.blocks[0] for s in part.sources.values()) < 0:
        ranges = ", ".join(f"{name} {list(source.blocks)}" for name, source in part.sources.items())
        raise RecipeError(f"slices.{number}: sources must have the same number of blocks, at least 1; found {ranges}")
    return lengths.pop()


def _place(name: str, depth: float, names: Mapping[str, str], part: Slice, recipe: Recipe) -> Place:
    own = {
        model: (
            source.settings,
            *((recipe.experts[model].settings,) if model in recipe.experts else ()),
            part.settings,
        )
        for model, source in part.sources.items()
    }
    return Place(name=name, depth=depth, names=names, scopes=(part.settings,), own_scopes=own)


def _before_blocks(frame: Checkpoint, prefix: str) -> frozenset[str]:
    """The tensors defined before the blocks (embeddings), by the model class's own order."""
    ordered = families.skeleton(frame.config).parameters
    first_block = next((i for i, name in enumerate(ordered) if name.startswith(f"{prefix}.")), len(ordered))
    return frozenset(ordered[:first_block])


def output_config(recipe: Recipe, checkpoints: Mapping[str, Checkpoint], frame: Checkpoint) -> dict[str, Any]:
    """The output's config.json: the frame's, with the number of blocks and the dtype of the output."""
    config = dict(frame.config)
    if recipe.slices is not None:
        key = families.num_blocks_key(config)
        old, picked = config[key], _picked_blocks(recipe.slices)
        # Settings per block (say, `layer_types`) follow their blocks.
        for name, value in config.items():
            if isinstance(value, list) and len(value) == old:
                config[name] = [_block_value(checkpoints[model], name, index) for model, index in picked]
        config[key] = len(picked)
    if recipe.output.dtype is not None:
        config.pop("torch_dtype", None)
        config["dtype"] = recipe.output.dtype
    return config


def _picked_blocks(slices: Sequence[Slice]) -> list[tuple[str, int]]:
    """The first source's model and block for each block of the output."""
    return [
        (model, index)
        for part in slices
        for model, source in [next(iter(part.sources.items()))]
        for index in range(*source.blocks)
    ]


def _block_value(checkpoint: Checkpoint, name: str, index: int) -> Any:
    values = checkpoint.config.get(name)
    if not isinstance(values, list) or index >= len(values):
        raise MismatchError(f"{checkpoint.location}: config.json has no {name} for block {index}")
    return values[index]
