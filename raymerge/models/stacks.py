"""Find the stacks of blocks in a model: lists of modules of one class that the hidden states pass one by one."""

from dataclasses import dataclass
from typing import Any

from torch import nn

from raymerge.errors import RecipeError


@dataclass(frozen=True, slots=True)
class Stack:
    """A list of blocks by its name in the trunk (`layers`, `encoder.layer`), and how many there are."""

    name: str
    num_blocks: int

    def parameter_prefix(self, block: int) -> str:
        return f"{self.name}.{block}."


def find_stacks(trunk: Any, asked: str | None = None) -> tuple[Stack, ...]:
    """The stacks of a trunk in the order they run: one, or an encoder's and a decoder's.

    `asked` names one, as the trunk or the checkpoint calls it. Raises RecipeError, listing what there is, if it
    is unknown, or if several lists are equally long and none was asked for.
    """
    found = _outermost(trunk)
    listed = ", ".join(f"{stack.name} ({stack.num_blocks})" for stack in found) or "none"
    if asked is not None:
        named = [stack for stack in found if asked in (stack.name, f"{trunk.base_model_prefix}.{stack.name}")]
        if not named:
            raise RecipeError(f"settings.blocks: found {asked!r}; lists of blocks are {listed}")
        return tuple(named)
    if trunk.config.is_encoder_decoder:
        halves = tuple(_longest([s for s in found if s.name.startswith(side)]) for side in ("encoder.", "decoder."))
        if all(len(half) == 1 for half in halves):
            return (*halves[0], *halves[1])
    longest = _longest(found)
    if len(longest) != 1:
        raise RecipeError(f"settings.blocks: cannot tell which blocks to fit; name one of {listed}")
    return longest


def _longest(stacks: list[Stack]) -> tuple[Stack, ...]:
    most = max((stack.num_blocks for stack in stacks), default=0)
    return tuple(stack for stack in stacks if stack.num_blocks == most)


def _outermost(trunk: nn.Module) -> list[Stack]:
    """Lists of modules of one class that have parameters, and do not lie inside another list."""
    found: list[Stack] = []
    for name, module in trunk.named_modules():
        inside = any(name.startswith(f"{stack.name}.") for stack in found)
        if inside or not isinstance(module, nn.ModuleList) or len({type(block) for block in module}) != 1:
            continue
        if any(True for _ in module.parameters()):
            found.append(Stack(name, len(module)))
    return found
