"""Give a merged trunk the head of one expert, as a transformers model that is ready to use.

Format, below a merged folder: `raymerge/heads/<expert>/config.json` is the expert's own, and
`raymerge/heads/<expert>/model.safetensors` holds its tensors that were not merged, as the expert names them.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from torch import Tensor

from raymerge.checkpoint.index import SINGLE, Checkpoint, open_checkpoint
from raymerge.checkpoint.model_folder import HEADS, RECIPE
from raymerge.checkpoint.remote import is_remote
from raymerge.errors import CheckpointError
from raymerge.models.families import base_model_prefix
from raymerge.models.load import architecture, load_as_saved, read_tensors, require_complete
from raymerge.models.quiet import quiet

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# What a model with another vocabulary says differently; it follows the trunk, whose embeddings are used.
_OF_THE_VOCABULARY = ("vocab_size", "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")


def load_task_model(out: str | Path, expert: str) -> "PreTrainedModel":
    """The merged model of the folder `out` with the head of `expert`, in eval mode and the merged dtype.

    Where the expert has no head of its own (it was merged too), the merged model as it is. Raises
    CheckpointError if the folder or expert is unknown, or tensors of the model are in neither part.
    """
    if is_remote(str(out)):
        return _load_remote_task_model(str(out), expert)
    folder = Path(out)
    heads = folder / HEADS
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder; the output of a merge is expected")
    if not (heads / expert).is_dir():
        _require_known(folder, heads, expert)
        return load_as_saved(str(folder.absolute()))
    owner = open_checkpoint(str((heads / expert).absolute()))
    return _assemble(open_checkpoint(str(folder.absolute())), owner, tuple(owner.tensors))


def _load_remote_task_model(out: str, expert: str) -> "PreTrainedModel":
    try:
        owner = open_checkpoint(f"{out}/{HEADS}/{expert}")
    except CheckpointError:
        # Its head was merged, or it is not known: then the model says what it lacks.
        return load_as_saved(out)
    return _assemble(open_checkpoint(out), owner, tuple(owner.tensors))


def load_with_head(trunk: str, owner: str) -> "PreTrainedModel":
    """The model `trunk` (a base without a head) with the head of the model `owner`; folders or hub ids.

    The head is what only the owner has, or has in another shape outside the trunk. Raises CheckpointError.
    """
    body, whole = open_checkpoint(trunk), open_checkpoint(owner)
    prefix = base_model_prefix(whole.config)
    shapes = {_core(name, prefix): entry.shape for name, (_, entry) in body.tensors.items()}

    def is_of_head(name: str, shape: tuple[int, ...]) -> bool:
        known = shapes.get(_core(name, prefix))
        # Inside the trunk only embeddings differ in shape, when tokens were added; the trunk's rows are used.
        return known is None or (known != shape and not name.startswith(f"{prefix}."))

    return _assemble(
        body, whole, tuple(name for name, (_, entry) in whole.tensors.items() if is_of_head(name, entry.shape))
    )


def _assemble(trunk: Checkpoint, owner: Checkpoint, names: tuple[str, ...]) -> "PreTrainedModel":
    """A model of the owner's kind: the tensors `names` from the owner, all others from the trunk."""
    prefix = base_model_prefix(owner.config)
    replaced = {_core(name, prefix) for name in names}
    kept = [name for name in trunk.tensors if _core(name, prefix) not in replaced]
    return assemble(read_tensors(trunk, kept), trunk.config, str(trunk.location), owner, names)


def assemble(
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any],
    where: str,
    owner: Checkpoint | None = None,
    names: tuple[str, ...] = (),
) -> "PreTrainedModel":
    """A model in eval mode from tensors in memory, and those called `names` of the checkpoint `owner`.

    `config` is that of the tensors; the owner's says of what kind the model is. Raises CheckpointError.
    """
    from safetensors import SafetensorError

    kind = config if owner is None else owner.config
    cls = architecture(kind, where)
    said = f"{where} with the head of {owner.location}" if owner else where
    try:
        settings = cls.config_class.from_dict(dict(kind))
        _adopt_vocabulary(settings, config)
        # from_pretrained adds or removes the prefix tensor by tensor, and knows names of older versions.
        state = {**tensors, **(read_tensors(owner, names) if owner else {})}
        with quiet():
            model, info = cls.from_pretrained(
                None, config=settings, state_dict=state, dtype="auto", output_loading_info=True
            )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as problem:
        raise CheckpointError(f"{said}: does not fit {cls.__name__}: {problem}") from None
    require_complete(model, list(info["missing_keys"]), said)
    unused = sorted(set(info["unexpected_keys"]) & set(names))
    if unused and owner is not None:
        raise CheckpointError(
            f"{owner.location}: {cls.__name__} has no place for {', '.join(unused[:5])}; a config.json that fits "
            f"the tensors is expected"
        )
    found: PreTrainedModel = model.eval()
    return found


def _adopt_vocabulary(config: Any, trunk: Mapping[str, Any]) -> None:
    """Set what depends on the vocabulary to what the trunk says."""
    config.dtype = trunk.get("dtype", trunk.get("torch_dtype"))
    for target, source in ((config.get_text_config(), trunk.get("text_config") or trunk), (config, trunk)):
        for key in _OF_THE_VOCABULARY:
            if source.get(key) is not None and hasattr(target, key):
                setattr(target, key, source[key])


def _core(name: str, prefix: str | None) -> str:
    """A tensor's name without the prefix that models with a head put before their trunk."""
    return name.removeprefix(f"{prefix}.") if prefix else name


def _require_known(folder: Path, heads: Path, expert: str) -> None:
    """Tell an expert whose head was merged from a name that is wrong."""
    recipe = folder / RECIPE
    if not recipe.is_file():
        if heads.is_dir():
            raise CheckpointError(f"{heads}: no head of {expert!r}; there are {', '.join(sorted(_folders(heads)))}")
        return
    experts = (yaml.safe_load(recipe.read_text(encoding="utf-8")) or {}).get("experts") or {}
    if expert not in experts:
        raise CheckpointError(f"{folder}: no expert {expert!r}; it was merged from {', '.join(experts)}")


def _folders(place: Path) -> list[str]:
    return [entry.name for entry in place.iterdir() if (entry / SINGLE).is_file()]
