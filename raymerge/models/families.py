"""What a model family says of itself through transformers, from `config.json` alone and with no weights.

Everything is read off the class that `architectures` names, or off that class built on the meta device.
"""

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from threading import Lock
from typing import Any

import torch

from raymerge.errors import CheckpointError
from raymerge.models.quiet import quiet

# Models that transformers builds in two threads at once may lack parameters.
_building = Lock()


@dataclass(frozen=True, slots=True)
class Skeleton:
    """A model without weights: its parameters in order of definition, shapes of those that are stored, embeddings.

    `input_embedding` and `output_embedding` are parameter names (the output's bias follows it), or None.
    """

    parameters: tuple[str, ...]
    shapes: Mapping[str, tuple[int, ...]]
    input_embedding: str | None
    output_embeddings: tuple[str, ...]
    tied: bool


def base_model_prefix(config: Mapping[str, Any]) -> str | None:
    """The name under which a model with a head keeps its trunk (`bert`, `model`); None if it is unknown."""
    architecture = _class(config)
    prefix = getattr(architecture, "base_model_prefix", "")
    return prefix or None


def num_blocks_key(config: Mapping[str, Any]) -> str:
    """The key of `config.json` that counts blocks."""
    for key in ("num_hidden_layers", "n_layer", "num_layers", "n_layers"):
        if key in config:
            return key
    raise CheckpointError(f"config.json of {config.get('model_type')}: no number of blocks; slices cannot be merged")


def skeleton(config: Mapping[str, Any]) -> Skeleton:
    """Build the model on the meta device. Raises CheckpointError if transformers does not know it."""
    with _building:
        return _skeleton(_Frozen(config))


def parameter_shapes(config: Mapping[str, Any]) -> Mapping[str, tuple[int, ...]]:
    """Names and shapes of what a checkpoint of this model holds. Raises CheckpointError."""
    return skeleton(config).shapes


class _Frozen:
    """A config as a cache key: compared and hashed by its text."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = dict(config)
        self._key = repr(sorted(self.config.items(), key=str))

    def __hash__(self) -> int:
        return hash(self._key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Frozen) and self._key == other._key


@lru_cache(maxsize=16)
def _skeleton(frozen: _Frozen) -> Skeleton:
    config = frozen.config
    architecture = _class(config)
    if architecture is None:
        raise CheckpointError(
            f"config.json: architectures {config.get('architectures')} are unknown to transformers; "
            f"embeddings and slices need a known model class"
        )
    try:
        with torch.device("meta"), quiet():
            model = architecture(architecture.config_class.from_dict(config))
    except Exception as problem:
        raise CheckpointError(f"config.json: {architecture.__name__} cannot be built from it: {problem}") from None
    prefixes = {id(module): name for name, module in model.named_modules()}

    def parameters_of(module: Any) -> tuple[str, ...]:
        prefix = prefixes.get(id(module))
        own = module.named_parameters(recurse=False) if module is not None and prefix is not None else ()
        return tuple(f"{prefix}.{name}" for name, _ in own)

    embedding = _embedding(model, "get_input_embeddings")
    output = _embedding(model, "get_output_embeddings")
    inputs = parameters_of(embedding)
    return Skeleton(
        tuple(name for name, _ in model.named_parameters(remove_duplicate=False)),
        {name: tuple(parameter.shape) for name, parameter in model.named_parameters()},
        inputs[0] if inputs else None,
        parameters_of(output),
        bool(getattr(model.config, "tie_word_embeddings", False)),
    )


def _embedding(model: Any, getter: str) -> Any:
    # Image models raise NotImplementedError, some return None.
    with contextlib.suppress(NotImplementedError, AttributeError):
        return getattr(model, getter)()
    return None


def _class(config: Mapping[str, Any]) -> Any:
    """The transformers class that `architectures` names, else the plain model of `model_type`; or None."""
    import transformers

    for name in config.get("architectures") or ():
        found = getattr(transformers, str(name), None)
        if found is not None:
            return found
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_MAPPING

    kind = config.get("model_type")
    return MODEL_MAPPING.get(CONFIG_MAPPING[kind], None) if kind in CONFIG_MAPPING else None
