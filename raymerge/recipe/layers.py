"""The data-flow space of evolutionary merging (arXiv:2403.13187): which expert's blocks stand one after the other.

All blocks of all experts are laid in a row, several times over; a number above 0 keeps a block, so blocks are skipped,
repeated and exchanged. Where the next block is another expert's, what it adds may be scaled.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from raymerge.checkpoint.index import open_checkpoint
from raymerge.errors import RecipeError
from raymerge.models.families import num_blocks_key
from raymerge.recipe.schema import Layers, Recipe


@dataclass(frozen=True, kw_only=True, slots=True)
class Slot:
    """A place in the row: a block of an expert."""

    name: str
    expert: str
    block: int


def slots(recipe: Recipe, layers: Layers) -> tuple[Slot, ...]:
    """The row of blocks. Raises RecipeError if experts differ in how many they have, CheckpointError."""
    counts = {}
    for name, expert in recipe.experts.items():
        config = open_checkpoint(expert.path).config
        counts[name] = int(config[num_blocks_key(config)])
    if len(set(counts.values())) > 1:
        raise RecipeError(f"search.layers: experts have {counts} blocks; equal numbers are expected")
    return tuple(
        Slot(name=f"layers.{turn}.{expert}.{block}", expert=expert, block=block)
        for turn in range(layers.repeats)
        for expert, count in counts.items()
        for block in range(count)
    )


def hops(recipe: Recipe) -> dict[tuple[str, str], str]:
    """The names of the scales, by the experts before and after a hop."""
    return {(a, b): f"scale[{a}>{b}]" for a in recipe.experts for b in recipe.experts if a != b}


def slices_of(recipe: Recipe, layers: Layers, values: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The slices of a recipe that a trial's numbers make; runs of one expert's blocks are one slice.

    Raises RecipeError if no block is kept.
    """
    kept = [slot for slot in slots(recipe, layers) if values[slot.name] > 0]
    if not kept:
        raise RecipeError("search.layers: this trial keeps no block")
    found: list[dict[str, Any]] = []
    before: Slot | None = None
    scale = 1.0
    for slot in kept:
        if before is not None and before.expert != slot.expert:
            scale = float(values.get(hops(recipe)[before.expert, slot.expert], 1.0))
        if before is not None and (before.expert, before.block + 1) == (slot.expert, slot.block):
            found[-1]["sources"][slot.expert]["blocks"][1] += 1
        else:
            settings = [{"filter": part, "value": scale} for part in layers.scaled]
            scaled = {"settings": {"scale": [*settings, {"value": 1.0}]}} if layers.scale is not None else {}
            found.append({"sources": {slot.expert: {"blocks": [slot.block, slot.block + 1]}}, **scaled})
        before = slot
    return found
