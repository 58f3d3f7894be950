"""Which tensor of one checkpoint is which tensor of another: same names, or same but for the trunk's prefix."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from raymerge.checkpoint.index import Checkpoint
from raymerge.models import families


@dataclass(frozen=True, slots=True)
class Names:
    """How an expert calls the tensors of the frame, and what it has beside them."""

    own: Mapping[str, str]
    extra: tuple[str, ...]


def match_names(frame: Checkpoint, other: Checkpoint) -> Names:
    """Match tensors by name; where that fails, by name without either model's `base_model_prefix`.

    So a headless base (`encoder.layer.0...`) meets experts saved with a head (`bert.encoder.layer.0...`).
    """
    own = {name: name for name in frame.tensors if name in other.tensors}
    if len(own) < len(frame.tensors):
        prefixes = {families.base_model_prefix(frame.config), families.base_model_prefix(other.config)}
        for prefix in sorted(prefix for prefix in prefixes if prefix):
            ours, theirs = _cores(frame.tensors, prefix), _cores(other.tensors, prefix)
            found = {ours[core]: theirs[core] for core in ours if core in theirs}
            if len(found) > len(own):
                own = found
    taken = set(own.values())
    return Names(own, tuple(name for name in other.tensors if name not in taken))


def _cores(names: Iterable[str], prefix: str) -> dict[str, str]:
    """Names without the prefix, with what they were."""
    return {name.removeprefix(f"{prefix}."): name for name in names}


def trunk_names(frame: Checkpoint) -> frozenset[str]:
    """The tensors of the trunk: those under the model's prefix, or all where nothing has it."""
    prefix = families.base_model_prefix(frame.config)
    inside = frozenset(name for name in frame.tensors if prefix and name.startswith(f"{prefix}."))
    return inside or frozenset(frame.tensors)


def head_module(name: str) -> str:
    """The module a head's tensor belongs to: the first part of its name."""
    return name.partition(".")[0]
