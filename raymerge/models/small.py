"""Small models built from nothing, for the demo and for tests: a vision transformer for digits."""

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from raymerge.models.quiet import quiet

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Pixels 0 to 255 become -1 to 1.
_MEAN = _STD = 0.5


def small_vision_classifier(
    *, image_size: int, patch_size: int, hidden_size: int, num_blocks: int, num_labels: int, seed: int
) -> "PreTrainedModel":
    """A ViT for square grey images of `image_size` pixels, with random weights drawn from `seed`."""
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        image_size=image_size,
        patch_size=patch_size,
        num_channels=1,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=num_blocks,
        num_attention_heads=4,
        num_labels=num_labels,
    )
    # transformers draws from torch's global generator; the caller's draws shall not change.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ViTForImageClassification(config)


def normalise(pixels: torch.Tensor) -> torch.Tensor:
    """What the saved image processor does: (B, H, W) uint8 to (B, 1, H, W) float32."""
    return ((pixels.float() / 255 - _MEAN) / _STD).unsqueeze(1)


def save_vision_classifier(model: "PreTrainedModel", folder: Path) -> None:
    """Write model and image processor as a Hugging Face checkpoint."""
    from transformers import ViTImageProcessorPil

    size = model.config.image_size
    processor = ViTImageProcessorPil(
        size={"height": size, "width": size}, image_mean=[_MEAN], image_std=[_STD], do_convert_rgb=False
    )
    with quiet():
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
