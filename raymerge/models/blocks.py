"""Find a model's blocks from its tensor names: `model.layers.7.mlp.up_proj.weight` is in block 7."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

_NUMBER = re.compile(r"(?:^|\.)(\d+)\.")


@dataclass(frozen=True, slots=True)
class BlockName:
    """A tensor's name, taken apart at its block: `prefix.index.rest`."""

    prefix: str
    index: int
    rest: str

    def at(self, index: int) -> str:
        """The same tensor in another block."""
        return f"{self.prefix}.{index}.{self.rest}" if self.prefix else f"{index}.{self.rest}"


def block_name(name: str) -> BlockName | None:
    """The block a tensor lies in, by the first number in its name; None if there is no number."""
    found = _NUMBER.search(name)
    if found is None:
        return None
    return BlockName(name[: found.start()], int(found[1]), name[found.end() :])


def block_lists(names: Iterable[str]) -> dict[str, int]:
    """How many blocks stand under each prefix, counting prefixes whose blocks are numbered 0, 1, 2, ..."""
    found: dict[str, set[int]] = {}
    for name in names:
        block = block_name(name)
        if block:
            found.setdefault(block.prefix, set()).add(block.index)
    return {prefix: len(indices) for prefix, indices in found.items() if max(indices) == len(indices) - 1}


def natural_order(name: str) -> tuple[tuple[int, int | str], ...]:
    """A sort key that puts block 2 before block 10."""
    return tuple((1, int(part)) if part.isdigit() else (0, part) for part in name.split("."))
