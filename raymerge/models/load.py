"""Load models, tokenizers and image processors of checkpoints, ready to be measured.

Always from safetensors, in eval mode, and never with code that comes with a checkpoint. A tensor that a
checkpoint does not have is an error: transformers would draw it at random.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from raymerge.checkpoint.index import Checkpoint, open_checkpoint, read_json
from raymerge.checkpoint.location import Location, resolve
from raymerge.checkpoint.reader import StoredTensor, open_reader
from raymerge.errors import CheckpointError
from raymerge.models import vocabulary
from raymerge.models.quiet import quiet

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load_classifier(model: str, device: str = "cpu") -> "PreTrainedModel":
    """A classifier of texts or images, as the checkpoint's config says.

    `model` is a folder or hub id. Raises CheckpointError if it is missing, damaged, of another kind, or
    has no head.
    """
    import transformers

    location = resolve(model)
    auto = (
        transformers.AutoModelForImageClassification
        if _is_for_images(location)
        else transformers.AutoModelForSequenceClassification
    )
    return place(_load(auto, location), device)


def load_language_model(model: str, device: str = "cpu") -> "PreTrainedModel":
    """A causal language model. Raises CheckpointError if `model` is missing, damaged or of another kind."""
    import transformers

    return place(_load(transformers.AutoModelForCausalLM, resolve(model)), device)


def has_classifier(config: Mapping[str, Any]) -> bool:
    """A checkpoint with this `config.json` was saved with a classification head."""
    return any(str(name).endswith("Classification") for name in config.get("architectures") or ())


def load_as_saved(model: str) -> "PreTrainedModel":
    """A model through the class its `config.json` names, in the stored dtype. Raises CheckpointError."""
    location = resolve(model)
    config = read_json(location, "config.json", location.files())
    return _load(architecture(config, str(location)), location)


def load_tokenizer(model: str) -> Any:
    """The tokenizer of a folder or hub id. Raises CheckpointError."""
    location = resolve(model)
    with quiet():
        return vocabulary.load_tokenizer(location, location.files())


def load_image_processor(model: str) -> Any:
    """The image processor of a folder or hub id. Raises CheckpointError.

    It works through PIL: torchvision is no dependency, and where it is installed its resizing gives
    slightly other pixels, hence other scores.
    """
    from transformers import AutoImageProcessor

    location = resolve(model)
    with _as_checkpoint_error(location, "its image processor cannot be loaded"), quiet():
        place, revision = location.as_pretrained()
        return AutoImageProcessor.from_pretrained(place, revision=revision, backend="pil")


def reads_images(model: "PreTrainedModel") -> bool:
    """Whether a classifier takes pixels rather than tokens."""
    return str(model.main_input_name) == "pixel_values"


def place(model: "PreTrainedModel", device: str) -> "PreTrainedModel":
    """Move to a device, in eval mode: as stored on a GPU, in float32 on a CPU, where half floats are slow."""
    return model.to(device=device, dtype=torch.float32 if device == "cpu" else None).eval()


def architecture(config: Mapping[str, Any], where: str) -> Any:
    """The transformers class that a config's `architectures` names. Raises CheckpointError if there is none."""
    import transformers

    names = config.get("architectures") or ()
    for name in names:
        found = getattr(transformers, str(name), None)
        if found is not None:
            return found
    raise CheckpointError(f"{where}: config.json: architectures is {names!r}; a class of transformers is expected")


def require_complete(model: "PreTrainedModel", missing: list[str], where: str) -> None:
    """Raise CheckpointError if tensors of a model were in no file, hence drawn at random."""
    if missing:
        listed = ", ".join(sorted(missing)[:5]) + (", ..." if len(missing) > 5 else "")
        raise CheckpointError(
            f"{where}: no tensor for {listed}, which {type(model).__name__} needs; a checkpoint with this head, "
            f"or the head of an expert, is expected"
        )


def _load(cls: Any, location: Location) -> "PreTrainedModel":
    from transformers import AutoConfig

    with _as_checkpoint_error(location, f"{cls.__name__} cannot be loaded"), quiet():
        place, revision = location.as_pretrained()
        if location.is_remote:
            config = AutoConfig.from_pretrained(place)
            # An Auto class knows models by their configs; weights go from the storage to the model, not through files.
            kind = cls._model_mapping[type(config)] if hasattr(cls, "_model_mapping") else cls
            checkpoint = open_checkpoint(str(location))
            given: dict[str, Any] = {"config": config, "state_dict": read_tensors(checkpoint, checkpoint.tensors)}
            model, info = kind.from_pretrained(None, dtype="auto", output_loading_info=True, **given)
        else:
            model, info = cls.from_pretrained(
                place, revision=revision, dtype="auto", use_safetensors=True, output_loading_info=True
            )
    require_complete(model, list(info["missing_keys"]), str(location))
    return model


def read_tensors(checkpoint: Checkpoint, names: Iterable[str]) -> dict[str, Tensor]:
    """Some tensors of a checkpoint, in the stored dtype. Raises StorageError."""
    found: dict[str, Tensor] = {}
    with open_reader([checkpoint.location]) as reader:
        for name in names:
            file, entry = checkpoint.tensors[name]
            stored = StoredTensor(0, file, name, entry.start, entry.dtype, entry.shape)
            found[name] = reader.read(stored, 0, prod(entry.shape)).view(entry.shape)
    return found


def _is_for_images(location: Location) -> bool:
    from transformers import (
        MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
        MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
        AutoConfig,
    )

    with _as_checkpoint_error(location, "its config cannot be read"), quiet():
        place, revision = location.as_pretrained()
        config = AutoConfig.from_pretrained(place, revision=revision)
    if type(config) in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING:
        return True
    if type(config) in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        return False
    raise CheckpointError(f"{location}: a {config.model_type} model classifies neither texts nor images")


@contextmanager
def _as_checkpoint_error(location: Location, what: str) -> Iterator[None]:
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as problem:
        raise CheckpointError(f"{location}: {what}: {problem}") from None
